"""Compiles C++ test kernels that use the contraction templates, and calls them on tensors."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

import ke_gym

INCLUDE = Path(ke_gym.__file__).parent / "languages" / "include"
C_TYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.bfloat16: "ke::bf16",
    torch.float16: "ke::half",
    torch.int32: "int32_t",
    torch.int64: "int64_t",
    torch.bool: "bool",
}


def compile_library(source: str, *flags: str) -> ctypes.CDLL:
    """A loaded library; warnings are errors."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cpp"
        path.write_text(source)
        command = ["g++", "-O2", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
        command += [
            *(flags or ("-march=native",)),
            f"-I{INCLUDE}",
            str(path),
            "-o",
            str(path.with_suffix(".so")),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:4000]
        return ctypes.CDLL(str(path.with_suffix(".so")))


def vector_bytes(*flags: str) -> int:
    """What the compiler's vectors have under these flags (default: this machine's)."""
    macros = subprocess.run(
        ["g++", *(flags or ("-march=native",)), "-dM", "-E", "-x", "c++", "/dev/null"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return 64 if "__AVX512F__" in macros else 32 if "__AVX__ " in macros else 16


def call(
    function: ctypes._CFuncPtr, tensors: Sequence[torch.Tensor | None], numbers: Sequence[int] = ()
) -> None:
    """function(const void* const* tensors, const int64_t* numbers)."""
    pointers = (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))
    function(pointers, (ctypes.c_int64 * len(numbers))(*numbers))


def strided(
    shape: Sequence[int], order: Sequence[int], dtype: torch.dtype = torch.float32, pad: int = 0
) -> torch.Tensor:
    """Random values in this shape, laid out with the dimensions in ``order`` and ``pad`` unused elements a row."""
    sizes = [shape[d] for d in order]
    storage = torch.randn([*sizes[:-1], sizes[-1] + pad], dtype=torch.float64)
    return storage.to(dtype)[..., : sizes[-1]].permute([order.index(d) for d in range(len(order))])


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error over the largest magnitude; NaN must sit in the same places."""
    assert torch.equal(actual.isnan(), expected.isnan())
    error = (actual.double() - expected).abs().nan_to_num().max()
    return float(error / expected.abs().nan_to_num().max().clamp(min=1e-3))
