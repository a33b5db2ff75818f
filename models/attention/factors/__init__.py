"""Factors: numbers of queries and keys by place that multiply the weights."""
