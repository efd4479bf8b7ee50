"""What a cubin says of its kernels: registers, stack, shared memory, parameters. Plain ELF, no CUDA tools.

The attributes are those that ``cuobjdump -elf`` prints as EIATTR_…, in the sections ``.nv.info`` (per function)
and ``.nv.info.<kernel>``.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ke_gym.languages.declarations import SCALARS
from ke_gym.languages.device import Arch
from ke_gym.languages.plan import Launch, Plan

RESERVED = 1024
"""Bytes of shared memory that the system takes per block."""

_MACHINE = 190  # EM_CUDA
_FRAME_SIZE, _REGISTERS, _MAX_THREADS, _PARAMETER, _REQUIRED_THREADS = 0x11, 0x2F, 0x05, 0x17, 0x10


@dataclass(frozen=True)
class Resources:
    """One kernel: ``registers`` per thread, ``stack`` bytes per thread (spills and local arrays), static
    ``shared`` bytes per block, ``parameters`` as (offset, size) in bytes, ``threads`` per block at most (0: no
    limit given)."""

    kernel: str
    registers: int
    stack: int
    shared: int
    parameters: tuple[tuple[int, int], ...]
    threads: int = 0


@dataclass(frozen=True)
class _Section:
    name: str
    offset: int
    size: int
    kind: int
    link: int
    info: int


def is_cubin(binary: bytes) -> bool:
    """Whether a binary is device code, rather than a library for the processor."""
    return binary[:4] == b"\x7fELF" and binary[18:20] == _MACHINE.to_bytes(2, "little")


@lru_cache(maxsize=256)
def resources(cubin: bytes) -> dict[str, Resources]:
    """The kernels of a cubin by name. Raises ``ValueError`` if the bytes are no cubin."""
    try:
        return _read(cubin)
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"not a cubin: {error}") from error


def _read(cubin: bytes) -> dict[str, Resources]:
    if cubin[:6] != b"\x7fELF\x02\x01" or struct.unpack_from("<H", cubin, 18)[0] != _MACHINE:
        raise ValueError("not a cubin: no 64-bit CUDA ELF")
    sections = _sections(cubin)
    symbols = _symbols(cubin, sections)
    shared = {
        s.name.removeprefix(".nv.shared."): s.size for s in sections if s.name.startswith(".nv.shared.")
    }
    per_function: dict[int, dict[str, int]] = {}
    for section in sections:
        if section.name == ".nv.info":
            for attribute, payload in _attributes(cubin, section):
                if attribute in (_FRAME_SIZE, _REGISTERS) and len(payload) == 8:
                    symbol, value = struct.unpack("<II", payload)
                    per_function.setdefault(symbol, {})["rf"[attribute == _FRAME_SIZE]] = value
    known = {symbols.get(symbol, ""): values for symbol, values in per_function.items()}
    found: dict[str, Resources] = {}
    for section in sections:
        if not section.name.startswith(".nv.info."):
            continue
        kernel = section.name.removeprefix(".nv.info.")
        parameters: dict[int, tuple[int, int]] = {}
        threads = 0
        for attribute, payload in _attributes(cubin, section):
            if attribute == _PARAMETER:
                _, ordinal, offset, packed = struct.unpack("<IHHI", payload)
                parameters[ordinal] = (offset, packed >> 18)
            elif attribute in (_MAX_THREADS, _REQUIRED_THREADS) and len(payload) == 12:
                x, y, z = struct.unpack("<III", payload)
                threads = x * y * z
        values = known.get(kernel, {})
        ordered = tuple(parameters[k] for k in sorted(parameters))
        found[kernel] = Resources(
            kernel, values.get("r", 0), values.get("f", 0), shared.get(kernel, 0), ordered, threads
        )
    return found


def _sections(cubin: bytes) -> list[_Section]:
    (start,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    raw = [struct.unpack_from("<IIQQQQII", cubin, start + k * size) for k in range(count)]
    text = raw[names][4]
    return [_Section(_string(cubin, text + r[0]), r[4], r[5], r[1], r[6], r[7]) for r in raw]


def _symbols(cubin: bytes, sections: list[_Section]) -> dict[int, str]:
    table = next((s for s in sections if s.name == ".symtab"), None)
    if table is None:
        return {}
    text = sections[table.link].offset
    return {
        k: _string(cubin, text + struct.unpack_from("<I", cubin, table.offset + 24 * k)[0])
        for k in range(table.size // 24)
    }


def _string(data: bytes, start: int) -> str:
    return data[start : data.index(b"\0", start)].decode()


def _attributes(cubin: bytes, section: _Section) -> Iterator[tuple[int, bytes]]:
    """(attribute, payload); formats 1 to 3 hold their value in the two bytes where 4 holds the length."""
    position, end = section.offset, section.offset + section.size
    while position + 4 <= end:
        form, attribute, value = struct.unpack_from("<BBH", cubin, position)
        position += 4
        length = value if form == 4 else 0
        yield attribute, cubin[position : position + length]
        position += length


def examine(plans: Mapping[str, Plan], binaries: Mapping[str, bytes], arch: Arch) -> list[dict[str, Any]]:
    """What every launch takes of a device of ``arch``, each kind of launch once, JSON-able.

    ``registers`` and ``stack`` bytes per thread, ``shared`` bytes per block (static and dynamic), ``threads`` per
    block, ``occupancy``. Raises ``ValueError`` for what the binaries or the device do not allow.
    """
    launches: dict[str, dict[str, Any]] = {}
    prepared = (plan.preparation for plan in plans.values() if plan.preparation is not None)
    for plan in (*plans.values(), *prepared):
        for step in plan.steps:
            for launch in (step, *step.alternatives) if isinstance(step, Launch) else ():
                found = _usage(launch, binaries[launch.binary], arch)
                launches.setdefault(repr(found), found)
    return list(launches.values())


def _usage(launch: Launch, binary: bytes, arch: Arch) -> dict[str, Any]:
    kernel = resources(binary).get(launch.kernel)
    where = f"kernel {launch.kernel!r}" + (f" ({launch.label})" if launch.label else "")
    if kernel is None or launch.geometry is None:
        raise ValueError(f"{where} is not in its binary")
    sizes = [_size(ctype) for ctype in launch.ctypes]
    if sizes != [size for _, size in kernel.parameters]:
        raise ValueError(
            f"{where} takes parameters of {[n for _, n in kernel.parameters]} bytes, got {sizes}"
        )
    geometry = launch.geometry
    threads = math.prod(geometry.block)
    # From Hopper on the section also counts what the system keeps for itself.
    own = kernel.shared - RESERVED if arch.capability >= (9, 0) else kernel.shared
    shared = max(own, 0) + geometry.shared
    if kernel.threads and threads > kernel.threads:
        raise ValueError(f"{where} was compiled for {kernel.threads} threads a block, not {threads}")
    if shared > arch.block_shared:
        raise ValueError(
            f"{where} needs {shared} bytes of shared memory a block; {arch.name} has {arch.block_shared}"
        )
    if math.prod(geometry.cluster) > arch.cluster_blocks:
        raise ValueError(
            f"{where} wants clusters of {geometry.cluster} blocks; {arch.name} takes {arch.cluster_blocks}"
        )
    occupancy = arch.occupancy(threads, kernel.registers, shared)
    if not occupancy:
        raise ValueError(
            f"{where} needs {kernel.registers} registers for each of {threads} threads; {arch.name} has "
            f"{arch.registers} in all"
        )
    return {
        "binary": launch.binary,
        "kernel": launch.kernel,
        "label": launch.label,
        "registers": kernel.registers,
        "stack": kernel.stack,
        "shared": shared,
        "threads": threads,
        "occupancy": round(occupancy, 4),
    }


def _size(ctype: str) -> int:
    if ctype.endswith("*"):
        return 8
    return 128 if ctype == "CUtensorMap" else ctypes.sizeof(SCALARS[ctype])
