"""RoIAlign over one map or a pyramid of them: averages of bilinear samples."""
