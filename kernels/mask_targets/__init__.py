"""Mask targets: the share of each mask pixel that the ground truth covers, read from packed bitmaps."""
