"""Which pyramid level each box is pooled from."""
