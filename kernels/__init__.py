"""One module per operation: definition, reference, Triton, registration, cases. Imports torch and triton only."""
