"""Sigmoid cross-entropy on the mask channel of each slot's class."""
