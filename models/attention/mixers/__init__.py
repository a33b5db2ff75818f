"""Mechanisms of papers, composed of a core, a layout and parts: factories `mechanism(site) -> Mixer`."""
