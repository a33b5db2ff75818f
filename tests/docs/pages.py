"""The blocks of the README and of docs/: what a page tells a reader to type, and how to do it in one process.

A mark is an HTML comment in front of a block, one line each:
    <!-- test: add SETTINGS -->            behind every train.py and eval.py of the block
    <!-- test: replace OLD with NEW -->    in the whole block
    <!-- test: file PATH -->               the block is the content of that file
    <!-- test: given FILE of MODEL -->     a file of random weights in the authors' names; FILE/ is an autoencoder
    <!-- test: status 2 -->                the commands end so, and say what the block shows
    <!-- test: says so -->                 the commands, or the code above, print what the block shows
    <!-- test: only read, REASON -->       the commands are read and composed, not run

`python tests/docs/pages.py <page> …` runs pages in the working directory, a copy of the checkout.
"""

import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- test: (.*?) -->")
KNOWN = ("add ", "replace ", "file ", "given ", "status ", "says so", "only read, ")


@dataclass
class Block:
    """One fenced block of a page."""

    page: str  # path below the root
    line: int
    language: str
    text: str
    marks: list[str] = field(default_factory=list)

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    def marked(self, kind: str) -> list[str]:
        """What follows `kind` in its marks."""
        return [mark.removeprefix(kind).strip() for mark in self.marks if mark.startswith(kind)]

    @property
    def commands(self) -> list[str]:
        """Lines of a console block that begin with `$`, continued ones joined."""
        joined = self.text.replace("\\\n", " ")
        return [" ".join(line[2:].split()) for line in joined.splitlines() if line.startswith("$ ")]

    @property
    def shown(self) -> str:
        """What a console block shows as output, as one line."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return flat(" ".join(line for line in lines if not line.startswith("$ ")))


def pages() -> list[str]:
    """README, CONTRIBUTING, the README of recipes, and docs/."""
    found = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]
    return ["README.md", "CONTRIBUTING.md", "recipes/README.md", *found]


def blocks(page: str) -> Iterator[Block]:
    """The fenced blocks of a page, with the marks in front of them."""
    text, end = (ROOT / page).read_text(), 0
    for match in FENCE.finditer(text):
        before = text[end : match.start()].rstrip().splitlines()
        marks = []
        while before and before[-1].startswith("<!-- test: "):
            marks.insert(0, MARK.fullmatch(before.pop())[1])
        yield Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2], marks)
        end = match.end()


def flat(text: str) -> str:
    """Without line breaks, frames of tables, and what a terminal adds."""
    return " ".join(re.sub(r"[─-╿]", " ", text).split())


def words(command: str) -> list[str]:
    """The words of a command, without a comment at its end and without variables in front."""
    found = shlex.split(command, comments=True)
    while found and re.fullmatch(r"[A-Z_]+=\S*", found[0]):
        found = found[1:]
    return found


def settings(given: list[str]) -> list[str]:
    """The settings among the arguments of train.py or eval.py; of a sweep the first of several values."""
    found = [word for word in given if re.match(r"[+~]{0,2}[a-z][\w./@]*(=|$)", word)]
    return [re.sub(r"^([\w.@/]+=[\w/.]+),.*$", r"\1", word) if "[" not in word else word for word in found]


def replaced(block: Block) -> Block:
    """The block as the test runs it."""
    text = block.text
    for change in block.marked("replace "):
        old, _, new = change.partition(" with ")
        assert old in text, f"{block.where}: there is no {old!r} to be replaced"
        text = text.replace(old, new)
    return Block(block.page, block.line, block.language, text, block.marks)


def write_files(page: str, folder: Path) -> None:
    """The files that a page tells to write; a file that is there already gets the block at its end."""
    for block in blocks(page):
        for name in block.marked("file "):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text((path.read_text() if path.exists() else "") + block.text)


def environment(command: str) -> dict[str, str]:
    """The variables in front of a command."""
    return dict(re.findall(r"(?:^|\s)([A-Z_]+)=(\S+)", command.partition(" python")[0]))


if __name__ == "__main__":
    import sys

    sys.path[:0] = [os.getcwd(), str(ROOT)]
    from tests.docs.running import main

    main(sys.argv[1:])
