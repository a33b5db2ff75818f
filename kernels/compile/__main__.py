"""`python -m kernels.compile`: what compilers make of the kernels, or of all that a model's step launches."""

import sys

from kernels.compile import main

sys.exit(main())
