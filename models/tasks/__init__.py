"""LightningModules and the callbacks of a run."""
