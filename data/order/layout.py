"""How an optimizer step is shared between processes, and how it is shared anew where a run goes on with others.

A run keeps the steps of the layout that it began with: which images each of them sees. Another number of processes, or
another batch, deals the same images again. Where the batch of a process stays as it was, whole batches are dealt, so
that mixing, dropout and batch statistics stay the same too and the result differs by the order of sums alone.
"""

from typing import NamedTuple


class Layout(NamedTuple):
    """Images per process and batch, processes, batches per optimizer step, and batches of an epoch on each process."""

    batch: int
    processes: int
    accumulated: int
    batches: int

    @property
    def hands(self) -> int:
        """Batches of all processes in a step."""
        return self.processes * self.accumulated

    @property
    def images(self) -> int:
        """Images of a step."""
        return self.batch * self.hands

    def shared_anew(self, batch: int, processes: int, accumulated: int) -> "Layout | None":
        """The same steps in another layout of as many images; None where the last, shorter step cannot be dealt so.

        Of a shorter step a share is dealt that is as large as before, or its gradient would have another weight.
        """
        steps, rest = divmod(self.batches, self.accumulated)
        last, odd = divmod(rest * accumulated, self.accumulated)
        if odd or batch * processes * accumulated != self.images:
            return None
        return Layout(batch, processes, accumulated, steps * accumulated + last)

    def __str__(self) -> str:
        """ "4 x 64 x 2"."""
        return " x ".join(map(str, self[:3]))
