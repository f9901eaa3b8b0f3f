"""What a trained model is on disk: checkpoints, other programs' files, and the model made of them."""
