"""The web page on which a model is tried: what was found in an image, shown, measured and saved."""
