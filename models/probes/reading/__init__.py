"""What probes read from models and data before they report it."""
