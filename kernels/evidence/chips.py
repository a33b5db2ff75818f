"""What chips have: how many programs fit on a multiprocessor, what memory and issue slots give at most."""

from typing import NamedTuple

REGISTERS, REGISTER_UNIT = 65536, 256  # of a multiprocessor; given to warps in such units
RESERVED = 1024  # bytes of shared memory that the system keeps for every program
# of what the floors say: a good kernel's share of the bandwidth, and of the issue slots. 0.65 is generous: the flash
# attention of Triton's tutorial, at 380 TFLOP/s on an H100 with heads of 64 channels, uses about 0.45
BANDWIDTH_REACHED, ISSUE_REACHED = 0.85, 0.65


class Chip(NamedTuple):
    """A GPU: multiprocessors, their clock, and bytes per second that copying reaches."""

    target: str
    multiprocessors: int
    clock: float
    bandwidth: float

    @property
    def issued(self) -> float:
        """Instructions of warps per second, with four schedulers in every multiprocessor."""
        return self.multiprocessors * 4 * self.clock


CHIPS = {
    "H100": Chip("sm_90", 132, 1.755e9, 3.0e12),
    "H200": Chip("sm_90", 132, 1.755e9, 4.3e12),
    "A100": Chip("sm_80", 108, 1.41e9, 1.75e12),
}


class Multiprocessor(NamedTuple):
    """What programs share: warps and programs at most, and bytes of shared memory, of which one may have `program`."""

    warps: int
    programs: int
    shared: int
    program: int


KB = 1024
MULTIPROCESSORS = {
    "sm_80": Multiprocessor(64, 32, 164 * KB, 163 * KB),
    "sm_86": Multiprocessor(48, 16, 100 * KB, 99 * KB),
    "sm_89": Multiprocessor(48, 24, 100 * KB, 99 * KB),
    "sm_90": Multiprocessor(64, 32, 228 * KB, 227 * KB),
    "sm_100": Multiprocessor(64, 32, 228 * KB, 227 * KB),
    "sm_120": Multiprocessor(48, 24, 100 * KB, 99 * KB),
}


def blocks(target: str, registers: int, warps: int, shared: int) -> int:
    """Programs that fit on one multiprocessor; 0 if none does."""
    room = MULTIPROCESSORS[target]
    of_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    if shared > room.program:
        return 0
    by_registers = REGISTERS // of_warp // warps
    return min(by_registers, room.warps // warps, room.programs, room.shared // (shared + RESERVED))
