"""Images of all sizes resized, turned, flipped, cut, coloured and padded into one batch."""
