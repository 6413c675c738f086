"""The miniature: a rendered world, a tiny CLIP and a warm start, so that all runs on a CPU.

Importing it registers the miniature's datasets.
"""

from hierkd.miniature.world import register_miniature

register_miniature()
