"""Transforms: what changes queries, keys and values behind the projection."""
