"""From a trained model and an image to objects: found, encoded, drawn."""
