"""What eval.py measures or draws on a finished model."""
