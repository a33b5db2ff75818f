"""Which images make which batch, the counter-based randomness that says so, and what names the images."""
