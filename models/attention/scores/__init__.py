"""Scores: the logits of queries and keys, in place of their scaled product."""
