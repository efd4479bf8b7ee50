"""The elementary functions of <ke/math.h> and the storage types of <ke/types.h>, against float64 and torch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ke_gym.languages import cpp

FLOAT = ("exp", "log", "tanh", "erf", "rsqrt", "sqrt", "sigmoid", "gelu", "gelu_tanh", "silu", "softplus",
         "expm1", "log1p", "sin", "cos", "exp2", "log2", "log10")  # fmt: skip
DOUBLE = ("exp", "log", "tanh", "expm1", "log1p", "rsqrt", "sigmoid")


def _source() -> str:
    lines = ["#include <ke/math.h>", "#include <ke/types.h>"]
    for ctype, letter, names in (("float", "f", FLOAT), ("double", "d", DOUBLE)):
        for name in names:
            lines += [
                f'extern "C" void {letter}_{name}(const {ctype}* x, {ctype}* o, int64_t n) {{',
                "#pragma omp simd",
                f"for (int64_t i = 0; i < n; ++i) o[i] = ke::{name}(x[i]); }}",
            ]
    for name in ("pow", "max", "min"):
        lines += [
            f'extern "C" void f_{name}(const float* x, const float* y, float* o, int64_t n) {{',
            "#pragma omp simd",
            f"for (int64_t i = 0; i < n; ++i) o[i] = ke::{name}(x[i], y[i]); }}",
        ]
    for name in ("half", "bf16"):
        lines += [
            f'extern "C" void from_{name}(const ke::{name}* x, float* o, int64_t n) {{',
            "#pragma omp simd",
            "for (int64_t i = 0; i < n; ++i) o[i] = x[i]; }",
            f'extern "C" void to_{name}(const float* x, ke::{name}* o, int64_t n) {{',
            "#pragma omp simd",
            "for (int64_t i = 0; i < n; ++i) o[i] = x[i]; }",
        ]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def compiled() -> cpp.Compiled:
    return cpp.compile_unit(cpp.Unit(_source()))


@pytest.fixture(scope="module")
def library(compiled: cpp.Compiled, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("math") / "math.so"
    path.write_bytes(compiled.binary)
    return ctypes.CDLL(str(path))


def _call(function: Any, *arrays: Any, out: Any) -> Any:
    pointers = [
        ctypes.c_void_p(a.data_ptr() if isinstance(a, torch.Tensor) else a.ctypes.data)
        for a in (*arrays, out)
    ]
    function(*pointers, ctypes.c_int64(len(out)))
    return out


def test_every_loop_is_vectorized(compiled: cpp.Compiled) -> None:
    vectorized = {remark.kernel for remark in compiled.remarks if remark.width >= 16}
    every = {f"f_{n}" for n in (*FLOAT, "pow", "max", "min")} | {f"d_{n}" for n in DOUBLE}
    every |= {f"{way}_{kind}" for way in ("from", "to") for kind in ("half", "bf16")}
    assert every - vectorized == set()
    assert compiled.warnings == ()


EDGES = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 0.5, 2.0, 1e-45, -1e-45, 1e-40, 1.1754944e-38, 3.4e38,
         -3.4e38, 88.72, 88.73, -87.4, -103.9, -103.98, -104.5, 0.9999999, 1.0000001, -0.9999999, 0.93, 4.0,
         9.1, 20.0]  # fmt: skip


def _draws(dtype: Any) -> Any:
    draw = np.random.default_rng(0)
    bits = draw.integers(0, 2 ** (8 * np.dtype(dtype).itemsize), 60000, dtype=f"u{np.dtype(dtype).itemsize}")
    wide = 110 if dtype is np.float32 else 750
    parts = [
        np.array(EDGES),
        draw.standard_normal(40000),
        10 * draw.standard_normal(40000),
        draw.uniform(-wide, wide, 40000),
    ]
    return np.concatenate([*(p.astype(dtype) for p in parts), bits.view(dtype)])


def _wrong(got: Any, want: Any, ulps: float) -> Any:
    """Where ``got`` is more than ``ulps`` units in the last place from the exact ``want``, or of another kind."""
    rounded = want.astype(got.dtype)
    unit = np.spacing(np.maximum(np.abs(rounded), np.finfo(got.dtype).tiny)).astype(want.dtype)
    finite = np.isfinite(rounded)
    with np.errstate(all="ignore"):
        far = np.abs(got.astype(want.dtype) - want) > ulps * unit
    same = np.where(np.isnan(rounded), np.isnan(got), got == rounded)
    near_overflow = ~finite & (np.abs(got) == np.finfo(got.dtype).max)
    return np.where(finite & np.isfinite(got), far, ~same & ~near_overflow)


def _exact(name: str) -> Callable[[Any], Any]:
    def erf(x: Any) -> Any:
        return torch.erf(torch.from_numpy(x)).numpy()

    special: dict[str, Callable[[Any], Any]] = {"erf": erf, "rsqrt": lambda x: 1 / np.sqrt(x)}
    return special.get(name) or getattr(np, name)


ULPS = {"exp": 2, "log": 2, "erf": 2, "sin": 2, "cos": 2, "rsqrt": 2, "sqrt": 0.6, "expm1": 3, "log1p": 3,
        "tanh": 3,
        "exp2": 1, "log2": 1, "log10": 1}  # fmt: skip


@pytest.mark.parametrize("name", sorted(ULPS))
@np.errstate(all="ignore")
def test_float_functions(library: ctypes.CDLL, name: str) -> None:
    x = _draws(np.float32)
    if name in ("sin", "cos"):
        x = x[(np.abs(x) <= 2**28) | ~np.isfinite(x)]
    got = _call(getattr(library, f"f_{name}"), x, out=np.empty_like(x))
    wrong = _wrong(got, _exact(name)(x.astype(np.float64)), ULPS[name])
    assert x[wrong].tolist() == []


@pytest.mark.parametrize("name", ["exp", "log", "tanh", "expm1", "log1p", "rsqrt"])
@np.errstate(all="ignore")
def test_double_functions(library: ctypes.CDLL, name: str) -> None:
    x = _draws(np.float64)
    got = _call(getattr(library, f"d_{name}"), x, out=np.empty_like(x))
    wrong = _wrong(got, _exact(name)(x.astype(np.longdouble)), 3)
    assert x[wrong].tolist() == []


@pytest.mark.parametrize("name", ["sigmoid", "gelu", "gelu_tanh", "silu", "softplus"])
def test_activations_are_as_good_as_those_of_torch(library: ctypes.CDLL, name: str) -> None:
    torch_name = {"gelu_tanh": "gelu"}.get(name, name)
    options = {"approximate": "tanh"} if name == "gelu_tanh" else {}
    function = getattr(torch, name, None) or getattr(torch.nn.functional, torch_name)
    x = torch.cat([torch.randn(100000) * scale for scale in (1, 10, 60)] + [torch.tensor(EDGES)])
    got = _call(getattr(library, f"f_{name}"), x, out=torch.empty_like(x))
    torch.testing.assert_close(
        got, function(x.double(), **options).float(), rtol=1e-6, atol=1e-6, equal_nan=True
    )


@np.errstate(all="ignore")
def test_pow(library: ctypes.CDLL) -> None:
    draw = np.random.default_rng(1)
    edges = np.array([*EDGES, 3, -3, -2, 16777217], np.float32)
    anything = draw.integers(0, 2**32, 50000, dtype=np.uint32).view(np.float32)
    x = np.concatenate(
        [np.repeat(edges, len(edges)), anything, draw.uniform(-9, 9, 50000).astype(np.float32)]
    )
    y = np.concatenate(
        [np.tile(edges, len(edges)), draw.uniform(-20, 20, 50000), np.rint(draw.uniform(-9, 9, 50000))]
    )
    y = y.astype(np.float32)
    got = _call(library.f_pow, x, y, out=np.empty_like(x))
    want = np.power(x.astype(np.float64), y.astype(np.float64))
    wrong = _wrong(got, want, 1)
    assert list(zip(x[wrong], y[wrong])) == []
    assert np.array_equal(np.signbit(got[~np.isnan(got)]), np.signbit(want[~np.isnan(got)]))


def test_max_and_min_keep_nan_like_torch(library: ctypes.CDLL) -> None:
    edges = torch.tensor([0.0, 1.0, -1.0, np.inf, -np.inf, np.nan])
    x, y = edges.repeat_interleave(6), edges.repeat(6)
    for name, function in (("max", torch.maximum), ("min", torch.minimum)):
        got = _call(getattr(library, f"f_{name}"), x, y, out=torch.empty_like(x))
        torch.testing.assert_close(got, function(x, y), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("name", "dtype"), [("half", torch.float16), ("bf16", torch.bfloat16)])
def test_storage_types_convert_as_torch_does(library: ctypes.CDLL, name: str, dtype: torch.dtype) -> None:
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = _call(getattr(library, f"from_{name}"), every, out=torch.empty(65536))
    torch.testing.assert_close(wide, every.float(), rtol=0, atol=0, equal_nan=True)
    anything = torch.randint(-(2**31), 2**31, (200000,), generator=torch.Generator().manual_seed(0))
    ties = every.float() * (1 + 2.0**-9)
    x = torch.cat(
        [anything.to(torch.int32).view(torch.float32), every.float(), ties, every.float() * (1 + 2.0**-12)]
    )
    narrow = _call(getattr(library, f"to_{name}"), x, out=torch.empty(len(x), dtype=dtype))
    torch.testing.assert_close(narrow, x.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_the_headers_are_light() -> None:
    lines = [
        line for n in ("math.h", "types.h") for line in Path(cpp.INCLUDE, "ke", n).read_text().splitlines()
    ]
    assert {line.split()[1] for line in lines if line.startswith("#include")} == {"<cstdint>"}
