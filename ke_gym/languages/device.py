"""GPU architectures: what a kernel may take of one, whichever device it will run on.

Sources: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from ke_gym.errors import UserError

DEFAULT_ARCH = "sm_90a"


@dataclass(frozen=True)
class Arch:
    """One architecture.

    ``name`` is what compilers call it. Per multiprocessor: ``registers`` (32 bits each), ``shared`` bytes,
    ``warps``, ``blocks``; per block: ``block_shared`` bytes (static and dynamic), ``block_threads``.
    ``multiprocessors`` of the largest product, for kernels whose grid depends on it where the device is not known.
    """

    name: str
    capability: tuple[int, int]
    shared: int
    block_shared: int
    warps: int
    blocks: int
    multiprocessors: int
    registers: int = 65536
    block_threads: int = 1024
    cluster_blocks: int = 1

    def occupancy(self, threads: int, registers: int, shared: int) -> float:
        """The share of a multiprocessor's warps that can be resident (0: not one block fits).

        ``threads`` and ``shared`` bytes per block, ``registers`` per thread.
        """
        warps = -(-threads // 32)
        fits = [self.blocks, self.warps // warps]
        if registers:
            fits.append(self.registers // (-(-registers * 32 // 256) * 256 * warps))
        fits.append(self.shared // (-(-(shared + 1024) // 128) * 128))
        if shared > self.block_shared or threads > self.block_threads:
            return 0.0
        return min(fits) * warps / self.warps


_KIB = 1 << 10
_ARCHS = {
    arch.name: arch
    for arch in (
        Arch("sm_80", (8, 0), 164 * _KIB, 163 * _KIB, 64, 32, 108),
        Arch("sm_86", (8, 6), 100 * _KIB, 99 * _KIB, 48, 16, 84),
        Arch("sm_89", (8, 9), 100 * _KIB, 99 * _KIB, 48, 24, 142),
        Arch("sm_90", (9, 0), 228 * _KIB, 227 * _KIB, 64, 32, 132, cluster_blocks=16),
        Arch("sm_90a", (9, 0), 228 * _KIB, 227 * _KIB, 64, 32, 132, cluster_blocks=16),
        Arch("sm_100a", (10, 0), 228 * _KIB, 227 * _KIB, 64, 32, 148, cluster_blocks=16),
        Arch("sm_120a", (12, 0), 100 * _KIB, 99 * _KIB, 48, 24, 188, cluster_blocks=8),
    )
}


def get_arch(name: str = "") -> Arch:
    """The architecture of that name ("": the default). Raises ``UserError`` with the nearest name."""
    name = name or DEFAULT_ARCH
    if name not in _ARCHS:
        near = get_close_matches(name, _ARCHS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(_ARCHS)}"
        raise UserError(f"unknown GPU architecture {name!r}; {hint}")
    return _ARCHS[name]


def arch_of(capability: tuple[int, int]) -> Arch:
    """The architecture to build for, given a device's compute capability. Raises ``UserError``."""
    found = [arch for arch in _ARCHS.values() if arch.capability == tuple(capability)]
    if not found:
        major, minor = capability
        raise UserError(
            f"this GPU has compute capability {major}.{minor}, which kernels are not built for; "
            f"there are: {', '.join(_ARCHS)}"
        )
    return found[-1]
