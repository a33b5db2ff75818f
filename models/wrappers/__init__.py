"""Wrappers, one per file: what is done around a whole model; see `models.layers.wrapped`."""
