"""Which object each box overlaps most, and which boxes overlap each object most."""
