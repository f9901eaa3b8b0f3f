"""Greedy non-maximum suppression: padded over images and groups, and in torchvision's form."""
