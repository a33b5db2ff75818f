"""What an assembled kernel is made of: its instructions by kind and by source line, and its loops.

The disassembler of the Triton wheel prints the instructions with the lines of source that they come from, innermost
first. A branch backwards ends a loop.
"""

import re
import struct
import subprocess
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

Where = tuple[tuple[str, int], ...]  # file below the root and line, then where that was called from, and so on

ADDRESS = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
LABEL = re.compile(r"^(\.L_\S+):")
FRAME = re.compile(r'^\s*//## File "([^"]+)", line (\d+)( inlined at)?')

# attributes of a kernel in its ELF file, and the format of those with a size
REGISTERS, STACK, SIZED = 0x2F, 0x11, 4
# instructions by what they are; the rest is "other"
KINDS = {
    "load": {"LDG", "LDGSTS", "UBLKCP", "UTMALDG", "ATOMG"},
    "store": {"STG", "RED", "UTMASTG"},
    "shared": {"LDS", "STS", "LDSM", "STSM", "ATOMS"},
    "spill": {"LDL", "STL"},
    "product": {"HMMA", "HGMMA", "QGMMA", "IMMA", "UTCHMMA", "UTCQMMA", "DMMA"},
    "barrier": {"BAR"},
    "wait": {"DEPBAR", "WARPSYNC", "LDGDEPBAR", "WARPGROUP", "SYNCS", "MEMBAR", "FENCE"},
    "float": {"FFMA", "FMUL", "FADD", "FFMA2", "FMUL2", "FADD2", "HFMA2", "HADD2", "HMUL2", "FSEL", "FSETP", "FMNMX"},
    "special": {"MUFU"},
    "shuffle": {"SHFL"},
    "convert": {"F2F", "F2FP", "I2F", "F2I", "I2FP"},
    "integer": {
        "IMAD", "IADD3", "LEA", "IADD", "VIADD", "IABS", "ISETP", "LOP3", "SHF", "SEL", "PRMT", "MOV", "PLOP3", "LOP",
        "IMNMX", "VIMNMX", "VIADDMNMX", "SGXT", "BMSK", "FLO", "POPC",
    },
}  # fmt: skip
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names}


class Instruction(NamedTuple):
    """One of them; `target` is the address that a branch goes to."""

    address: int
    name: str
    operands: str
    where: Where
    target: int | None

    @property
    def kind(self) -> str:
        return KIND_OF.get(self.name.partition(".")[0], "other")


class Loop(NamedTuple):
    """From `first` to `last` address; `own` are its instructions without those of loops inside, `all` with them."""

    first: int
    last: int
    own: tuple[Instruction, ...]
    all: tuple[Instruction, ...]


def disassembled(cubin: bytes) -> list[Instruction]:
    """The instructions of the one kernel in a cubin, in the order of their addresses."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [str(_disassembler()), "-gi", "-c", str(path)]
        return parsed(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def parsed(listing: str) -> list[Instruction]:
    """Of a listing of nvdisasm: labels become addresses, comments places in the source."""
    found: list[tuple[int, str, str, Where]] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    frames: list[tuple[str, int]] = []
    ended = True  # whether the next comment begins a new place
    for line in listing.splitlines():
        if frame := FRAME.match(line):
            frames = [] if ended else frames
            frames.append((below_root(frame[1]), int(frame[2])))
            ended = not frame[3]
        elif label := LABEL.match(line):
            waiting.append(label[1])
        elif instruction := ADDRESS.match(line):
            address = int(instruction[1], 16)
            if found and address <= found[-1][0]:
                break  # what follows is another section
            labels |= dict.fromkeys(waiting, address)
            waiting = []
            found.append((address, instruction[2], instruction[3].strip(), tuple(frames)))
    return [Instruction(*i, _target(i[1], i[2], labels)) for i in found]


def below_root(path: str) -> str:
    """A file without the folder of the checkout: what Triton keeps on disk may come from another one."""
    return path[path.rfind("/kernels/") + 1 :] if "/kernels/" in path else path


def loops_of(code: list[Instruction]) -> list[Loop]:
    """By their first addresses; branches to one address are one loop, and a program that hangs at its end is none."""
    ends: dict[int, int] = {}
    for i in code:
        if i.target is not None and i.target < i.address:
            ends[i.target] = max(ends.get(i.target, 0), i.address)
    spans = sorted(ends.items())

    def loop(first: int, last: int) -> Loop:
        inner = [s for s in spans if s != (first, last) and first <= s[0] and s[1] <= last]
        everything = tuple(i for i in code if first <= i.address <= last)
        own = tuple(i for i in everything if not any(a <= i.address <= b for a, b in inner))
        return Loop(first, last, own, everything)

    return [loop(*span) for span in spans]


def mix(code: list[Instruction] | tuple[Instruction, ...]) -> Counter[str]:
    """How many instructions of each kind."""
    return Counter(i.kind for i in code)


def width(instruction: Instruction) -> int:
    """Bytes that a thread's load or store moves."""
    for bits in (256, 128, 64):
        if f".{bits}" in instruction.name:
            return bits // 8
    parts = instruction.name.split(".")
    return 1 if {"U8", "S8"} & set(parts) else 2 if {"U16", "S16"} & set(parts) else 4


def resources_of(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack: what was spilled.

    Both are attributes in a section of the ELF file: a format, a name, a size, and for these a symbol and a number.
    """
    info, at, found = _section(cubin, ".nv.info"), 0, dict.fromkeys((REGISTERS, STACK), 0)
    while at < len(info):
        form, name, size = struct.unpack_from("<BBH", info, at)
        if form == SIZED and name in found:
            found[name] = max(found[name], struct.unpack_from("<II", info, at + 4)[1])
        at += 4 + (size if form == SIZED else 0)
    return found[REGISTERS], found[STACK]


def _section(elf: bytes, name: str) -> bytes:
    (headers,) = struct.unpack_from("<Q", elf, 40)
    width, count, names = struct.unpack_from("<HHH", elf, 58)
    fields = [struct.unpack_from("<IIQQQQ", elf, headers + i * width) for i in range(count)]
    text = fields[names][4]
    for of_name, _, _, _, start, size in fields:
        if elf[text + of_name : elf.index(b"\0", text + of_name)] == name.encode():
            return elf[start : start + size]
    raise ValueError(f"machine code: a cubin must have a section {name}, got {count} others; compile it with Triton")


def _target(name: str, operands: str, labels: dict[str, int]) -> int | None:
    label = re.search(r"\(?(\.L_[^\s)`]+)\)?", operands)
    return labels.get(label[1]) if name.startswith("BRA") and label else None


@cache
def _disassembler() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
