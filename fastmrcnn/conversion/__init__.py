"""Weights of other programs: their files, names and orders of classes."""
