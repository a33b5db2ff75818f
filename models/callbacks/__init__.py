"""What happens during a run: Lightning callbacks."""
