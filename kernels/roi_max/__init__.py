"""The largest value of each bin, over one map or a pyramid: RoIPool, RoIWarp and RoIAlign of that kind."""
