"""Pools, one per file: the tokens of the last stage become features; see `models.layers.pooled`."""
