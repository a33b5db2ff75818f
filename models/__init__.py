"""Attention mechanisms, backbones, tasks, checkpoints and probes."""
