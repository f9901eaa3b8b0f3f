"""How good what was found is: COCO's numbers, and pictures."""
