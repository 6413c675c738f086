"""Scores and pictures: ZSD and GZSD figures, CLIP's upper bound, score heat maps."""
