"""The process that the others are forked from keeps the status of every child, in whatever order they end."""

import os

from tests.faults import server


def test_children_that_end_while_one_is_waited_for(tmp_path, monkeypatch):
    children = {}
    for number in range(3):
        child = os.fork()
        if child == 0:
            os._exit(number)
        children[child] = str(tmp_path / f"{number}.status")
    for child in children:
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    wait, calls = os.waitpid, []

    def interrupted(child, options):
        calls.append(child)
        if len(calls) == 1:  # as the signal of the second child does between two lines of Python
            server._reap(children)
        return wait(child, options)

    monkeypatch.setattr(server.os, "waitpid", interrupted)
    server._reap(children)
    assert not children
    assert [(tmp_path / f"{number}.status").read_text() for number in range(3)] == ["0", "1", "2"]
