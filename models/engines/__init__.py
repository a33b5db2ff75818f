"""How a run is spread over devices and processes: what stands behind `trainer.strategy`."""
