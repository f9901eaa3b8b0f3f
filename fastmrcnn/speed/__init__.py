"""Measuring the whole step: what `python -m fastmrcnn.benchmark` is made of."""
