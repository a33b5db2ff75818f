"""Reducers, one per file: fewer tokens between the blocks of a plain ViT; see `models.layers.reduced`."""
