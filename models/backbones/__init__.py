"""Backbones: one file per family; the token mixer is injected."""
