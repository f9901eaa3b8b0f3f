"""RoIPool, RoIWarp and RoIAlign that take the largest value of a bin, over one map or a pyramid."""
