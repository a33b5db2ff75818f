"""What ends a command with a message instead of a traceback."""


class UserError(ValueError):
    """Something that the user can mend, raised where it is found: printed as it is; the process ends with `status`."""

    status = 2


class RunFailed(UserError):
    """A run that ended by itself and says why."""

    status = 1


class DataFailed(RunFailed):
    """The data cannot be read any further."""

    status = 65  # sysexits' EX_DATAERR


class StorageFailed(RunFailed):
    """The run's folder takes no more checkpoints."""

    status = 74  # sysexits' EX_IOERR


class NumericsFailed(RunFailed):
    """The loss, a gradient or the weights are no longer finite."""

    status = 76  # sysexits' EX_PROTOCOL


class Failure(str):
    """What a run of a sweep said when it ended without a result; the other runs go on."""


def reason(error: Exception) -> str:
    """The first line of an error, without what OmegaConf puts in front of the message of a resolver of ours."""
    line = str(error).splitlines()[0]
    return line.rpartition("raised while resolving interpolation: ")[2]
