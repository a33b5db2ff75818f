"""Charts, maps over pictures and pages: what probes show."""
