"""Pres: what changes the tokens in front of the projection."""
