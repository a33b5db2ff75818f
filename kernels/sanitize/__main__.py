"""`python -m kernels.sanitize`: the kernels are interpreted, whatever the machine has."""

import os
import sys

from kernels import dispatch

os.environ["TRITON_INTERPRET"] = "1"  # before kernels are defined
dispatch.INTERPRETED = True

from kernels.sanitize.command import main  # noqa: E402

sys.exit(main())
