"""A message laid out for the terminal: sentences are wrapped, long lists of names stand in columns."""

import re
import sys
import textwrap

GAP = 2
LIST = re.compile(r"(?P<head>[\w. ]{1,60}): (?P<names>[^\s,]+(?:, [^\s,]+){7,})")


def fitted(message: str, width: int) -> str:
    """The message in lines of at most this width, where its words allow it."""
    return "\n".join(_line(line, width) for line in message.splitlines())


def width_of_errors() -> int | None:
    """Of the terminal that errors are shown on; None where they go elsewhere, and stay in one piece."""
    import shutil

    return shutil.get_terminal_size().columns if sys.stderr.isatty() else None


def _line(line: str, width: int) -> str:
    if len(line) <= width:
        return line
    if listed := LIST.fullmatch(line):
        return f"{listed['head']}:\n{columns(listed['names'].split(', '), width)}"
    return textwrap.fill(line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def columns(names: list[str], width: int, indent: str = "  ") -> str:
    """Names in columns, in their order from top to bottom."""
    cell = max(map(len, names)) + GAP
    across = max(1, (width - len(indent) + GAP) // cell)
    down = -(-len(names) // across)
    rows = (names[row::down] for row in range(down))
    return "\n".join(indent + "".join(name.ljust(cell) for name in row).rstrip() for row in rows)
