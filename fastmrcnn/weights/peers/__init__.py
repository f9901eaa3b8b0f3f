"""What torchvision and detectron2 call the same weights, and in which order they keep classes."""
