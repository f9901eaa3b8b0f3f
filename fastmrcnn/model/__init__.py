"""Mask R-CNN on padded tensors: modules that take values and never wait for the device."""
