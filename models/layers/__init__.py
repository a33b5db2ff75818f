"""Mechanism-free modules: one idea per file."""
