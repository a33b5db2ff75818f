"""Weights: what becomes of logits, in place of their softmax over the keys."""
