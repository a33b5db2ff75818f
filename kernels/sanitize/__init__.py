"""What Triton's interpreter, which runs programs in turn, does not show: accesses that a GPU would not forgive.

    python -m kernels.sanitize                      every check of every operation, forward and backward: minutes
    python -m kernels.sanitize moh_attention        of one of them

`watching` follows every load and store of the launches inside it, `accesses` says what is wrong with those of one.
"""
