"""What is said of the weights of `init=` and `resume=` before torch is loaded: that there are none."""

from pathlib import Path

from conf import text
from conf.errors import UserError
from models.checkpoints.format.directory import resolve
from models.checkpoints.hub import TIMM, fetch, is_name


def find_weights(arguments: list[str]) -> list[str]:
    """The arguments as they are; weights that a new run names are looked for, and those of the hub downloaded.

    Raises:
        UserError: there are none.
    """
    given = {key: text.plain(value) for key, _, value in (argument.partition("=") for argument in arguments)}
    if given.get("resume", "") not in ("", "auto", "must", "null") and not any(a.startswith("-") for a in arguments):
        resolve(given["resume"])
    path = given.get("init", "")
    folder = Path("outputs", given.get("run.name", ""), "checkpoints")
    if path in ("", "null") or any(argument.startswith("-") for argument in arguments) or folder.exists():
        return arguments  # one that goes on does not need them
    if is_name(path) and path.startswith(TIMM) and "." not in path:
        return arguments  # only timm, which loads torch, knows its usual weights
    try:
        found = fetch(path)
        if not found.is_file():
            resolve(found)
    except UserError as error:
        raise UserError(f"init: {str(error).partition(': ')[2]}") from error
    return arguments
