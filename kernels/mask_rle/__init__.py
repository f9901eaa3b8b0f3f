"""Mask RLE: run lengths of pasted masks, without the bitmaps."""
