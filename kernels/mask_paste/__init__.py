"""Mask paste: from mask probabilities within a box to bitmaps of the whole image."""
