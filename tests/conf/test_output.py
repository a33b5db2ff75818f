"""What is printed may go nowhere; it ends no command."""

import io
import os
import subprocess
import sys
import threading

import pytest

from conf import output
from conf.output import Kept

PROGRAM = """
import sys
sys.path.insert(0, %r)
from conf import output
with output.kept():
    for _ in range(20000):
        print("a line")
    print("done", file=sys.stderr)
sys.exit(3)
"""


def ended(before: str = "", **streams: object) -> tuple[int, str]:
    """The status of a program that prints much, and its errors."""
    source = before + PROGRAM % os.getcwd()
    done = subprocess.run([sys.executable, "-c", source], stderr=subprocess.PIPE, text=True, timeout=120, **streams)
    return done.returncode, done.stderr


def test_a_status_does_not_depend_on_who_reads(tmp_path):
    """A reader that has gone, a full disk, streams that were closed from the start."""
    readers, writer = os.pipe()
    os.close(readers)
    with open("/dev/full", "w") as full:
        found = [ended(stdout=stream) for stream in (writer, full)]
    os.close(writer)
    assert found == 2 * [(3, "done\n")]
    closed = "import os, sys\nfor number in (0, 1, 2): os.close(number)\nsys.stdout = sys.stderr = None\n"
    assert ended(closed) == (3, "")


def test_letters_that_a_terminal_has_not_are_replaced():
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    stream = Kept(shown)
    print("┌ ü", file=stream)
    stream.flush()
    assert shown.buffer.getvalue() == b"? ?\n" and not stream.lost


def test_a_reader_that_stands_still_is_not_waited_for():
    readers, writer = os.pipe()
    with os.fdopen(writer, "w") as pipe:
        stream = Kept(pipe)
        stream.patience = 0.01
        for number in range(300):
            print(f"{number:04d} {1000 * '.'}", file=stream)
        assert stream.lost
        found: list[bytes] = []
        reading = threading.Thread(target=lambda: found.extend(iter(lambda: os.read(readers, 65536), b"")))
        reading.start()
        stream.patience = 60.0
        while not stream._has_room():
            pass
        print("read again", file=stream)
    reading.join()
    os.close(readers)
    text = b"".join(found).decode()
    assert text.startswith("0000 ") and "0299" not in text and text.endswith("read again\n")


def test_the_streams_are_given_back(capsys):
    before = sys.stdout, sys.stderr
    with pytest.raises(KeyError), output.kept():
        assert isinstance(sys.stdout, Kept) and not sys.stdout.isatty()
        print("seen")
        raise KeyError
    assert (sys.stdout, sys.stderr) == before and capsys.readouterr().out == "seen\n"
