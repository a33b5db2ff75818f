"""What the definition and the kernels must agree on."""

# Below the norm of any query in use, and large enough for finite gradients at an all-zero token.
EPSILON = 1e-6
