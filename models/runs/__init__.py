"""Runs: training, evaluation, what is checked before them and what they leave."""
