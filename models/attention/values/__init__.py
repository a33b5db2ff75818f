"""Values: what is added to the heads, made of the values alone."""
