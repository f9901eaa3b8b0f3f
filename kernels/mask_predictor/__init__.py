"""The mask predictor of each slot's class alone, and its loss."""
