"""Predicted boxes from their deltas: decoded, clipped to the image, and filtered."""
