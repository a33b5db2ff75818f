"""What a process knows of process 0 when that is killed, and with it the store in which all leave their signs."""

import socket

import pytest

from models.engines.watch import Failure, Watch

pytestmark = pytest.mark.case(10)


class Signs:
    """A store of two processes, which can be gone at any call."""

    def __init__(self):
        self.content, self.left = {}, None

    def _answer(self):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("Connection reset by peer")

    def set(self, key, value):
        self._answer()
        self.content[key] = value

    def get(self, key):
        self._answer()
        return self.content[key]

    def check(self, keys):
        self._answer()
        return all(key in self.content for key in keys)

    def compare_set(self, key, old, new):
        self._answer()
        return self.content.setdefault(key, new)


@pytest.mark.parametrize("calls", range(5))
def test_whichever_call_fails_first_it_is_process_0_and_where_it_was(calls):
    signs = Signs()
    zero, one = (Watch(signs, rank, 2, lambda: 7, None) for rank in range(2))
    zero._say(0)
    one.start()
    one.leave()  # its thread looks at nothing
    one.join()
    signs.left = calls
    one.place(0)
    one._try(lambda: one._say(5))
    assert one.place(0) == (socket.gethostname(), 7)
    signs.left = 0
    assert one.found(0) == Failure(0, socket.gethostname(), "does not answer any more", 7) and one.speaks


def test_a_failure_that_somebody_has_told_is_the_one_that_counts():
    signs = Signs()
    zero, one = (Watch(signs, rank, 2, lambda: 7, None) for rank in range(2))
    zero.fail(Failure(0, "here", "failed with KeyError", 3))
    assert one.found(0) == Failure(0, "here", "failed with KeyError", 3)
