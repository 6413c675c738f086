"""Everything that knows CLIP: region crops, texts, caches of what it says."""
