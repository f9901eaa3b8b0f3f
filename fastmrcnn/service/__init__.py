"""A detector behind HTTP: images come in, are batched, and go out as COCO JSON."""
