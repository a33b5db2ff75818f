"""Which images make which batch, and the counter-based randomness that says so."""
