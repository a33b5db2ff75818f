"""Heads, one per file: features become logits; a factory is `head(dim, num_classes)`."""
