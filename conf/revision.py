"""Which code runs: the commit of this checkout, and what was changed since. Torch-free."""

import subprocess
from functools import cache
from typing import NamedTuple

from conf.names import CONF


class Revision(NamedTuple):
    """`commit` is None where the code is no git checkout; `patch` is "" where nothing tracked was changed."""

    commit: str | None
    patch: str
    untracked: list[str]

    def __str__(self) -> str:
        """ "410b0e4…", with "+changes" behind it where that commit alone would not give this code."""
        changed = "+changes" if self.patch or any(name.endswith((".py", ".yaml")) for name in self.untracked) else ""
        return f"{self.commit}{changed}" if self.commit else "unknown"


@cache
def revision() -> Revision:
    """Read once, so that a long run names the code that it was started with."""
    commit = _git("rev-parse", "HEAD").strip()
    if not commit:
        return Revision(None, "", [])
    return Revision(
        commit,
        _git("diff", "HEAD", "--no-color", "--no-ext-diff", "--binary"),
        _git("ls-files", "--others", "--exclude-standard").splitlines(),
    )


def _git(*arguments: str) -> str:
    """What git prints for this checkout; "" where it cannot: no git, no repository, or one of another user."""
    root = CONF.parent
    if not (root / ".git").exists():  # a repository around an unpacked archive is another one
        return ""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode(errors="replace") if done.returncode == 0 else ""
