"""What can be chosen (YAML), and how a choice is read: command line, names, and messages for wrong ones."""

import sys

OLDEST_PYTHON = (3, 11)

# Said before a line of the project is read that an older Python cannot parse.
if sys.version_info < OLDEST_PYTHON:
    sys.stderr.write(
        "Python must be {}.{} or newer, got {}.{}.{} ({}); name another one, as in `python3.12 train.py` "
        "or `make train PYTHON=python3.12`\n".format(*OLDEST_PYTHON, *sys.version_info[:3], sys.executable)
    )
    sys.exit(2)
