"""Detecting in pictures and videos, and exporting the detector."""
