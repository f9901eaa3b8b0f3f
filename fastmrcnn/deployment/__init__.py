"""Files that run a trained model without this program, and the check that they find what it finds."""
