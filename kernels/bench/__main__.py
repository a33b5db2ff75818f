"""`python -m kernels.bench`: compiled kernels, timed on a GPU or counted without one."""

import os
import sys

os.environ.pop("TRITON_INTERPRET", None)  # before kernels are defined: an interpreted kernel has no time

from kernels.bench.command import main

sys.exit(main())
