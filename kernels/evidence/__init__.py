"""What the machine code of the kernels says of their speed, without a GPU: `python -m kernels.compile --models`."""
