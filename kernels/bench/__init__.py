"""`python -m kernels.bench`: checks, then times every operation; without a GPU, counts bytes, memory and launches."""
