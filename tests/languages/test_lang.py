from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ke_gym import lang

ROWS = r"""
#include <ke/math.h>
#include <ke/types.h>
extern "C" void rows(const float* x, float* out, int64_t r, int64_t n) {
  #pragma omp parallel for
  for (int64_t i = 0; i < r; ++i) {
    float sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) sum += ke::exp(x[i * n + j]);
    for (int64_t j = 0; j < n; ++j) out[i * n + j] = ke::exp(x[i * n + j]) / sum;
  }
}
extern "C" void scale(const ke::half* x, ke::bf16* out, int32_t n, double by, bool negate) {
  for (int i = 0; i < n; ++i) out[i] = (float)x[i] * (float)(negate ? -by : by);
}
extern "C" int count(int n) { return n; }
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    kernels = lang.cpp(ROWS)
    assert kernels.library is not None
    patch.undo()
    return kernels


def test_runs_on_real_tensors(kernels: Any) -> None:
    x = torch.randn(17, 33)
    out = torch.empty_like(x)
    kernels.rows(x, out, *x.shape)
    torch.testing.assert_close(out, x.softmax(1))
    half = torch.randn(9).half()
    other = torch.empty(9, dtype=torch.bfloat16)
    kernels.scale(half, other, 9, 1.5, True)
    torch.testing.assert_close(other, (half.float() * -1.5).bfloat16())
    assert dir(kernels) == ["count", "rows", "scale"]
    assert repr(kernels.count) == "count(int32_t n)"


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("rows", (X, X), r"kernel 'rows' takes 4 arguments \(x, out, r, n\), got 2"),
        ("rows", (X, X.double(), 2, 3), r"argument 2 \('out'\): float\* takes float32, got a float64 tensor"),
        (
            "rows",
            (X.tolist(), X, 2, 3),
            r"argument 1 \('x'\): a tensor expected for const float\*, got a list",
        ),
        ("rows", (None, X, 2, 3), r"argument 1 \('x'\): a tensor expected for const float\*, got None"),
        ("rows", (X, X, 2.0, 3), r"argument 3 \('r'\): int64_t expected, got float 2.0"),
        ("rows", (X, X, 2, X), r"argument 4 \('n'\): int64_t expected, got a tensor"),
        ("rows", (X.to("meta"), X, 2, 3), r"argument 1 \('x'\): a dense CPU tensor expected"),
        ("rows", (X.to_sparse(), X, 2, 3), r"argument 1 \('x'\): a dense CPU tensor expected"),
        ("scale", (X.half(), X.bfloat16(), 2**31, 1, False), r"argument 3 \('n'\): 2147483648 does not fit"),
        (
            "scale",
            (X.half(), X.bfloat16(), 2, "1", False),
            r"argument 4 \('by'\): double expected, got str '1'",
        ),
        ("scale", (X.half(), X.bfloat16(), 2, 1.0, 2), r"argument 5 \('negate'\): bool expected, got 2"),
        ("count", (1,), r"kernel 'count' returns int; a kernel must return void"),
    ],
)
def test_errors_name_kernel_position_and_parameter(
    kernels: Any, name: str, args: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(lang.KernelError, match=message):
        getattr(kernels, name)(*args)


def test_unknown_kernels_name_the_nearest(kernels: Any) -> None:
    with pytest.raises(lang.KernelError, match=r"no kernel 'row': .* did you mean 'rows'\?"):
        kernels.row(X)
    with pytest.raises(lang.KernelError, match="it defines none"):
        lang.cpp("void f() {}").f()


def test_a_source_that_does_not_compile_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(lang.KernelError, match=r"kernel.cpp:1:\d+: error: 'b' was not declared"):
        lang.cpp('extern "C" void f(int a) { b = a; }').f(1)
    assert list(tmp_path.rglob("*.so")) == []


def test_the_cache_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = 'extern "C" void f(int a) { }'
    lang.cpp(source).f(1)
    (binary,) = tmp_path.rglob("*.so")
    before = binary.stat().st_mtime_ns
    lang.cpp(source).f(1)
    assert binary.stat().st_mtime_ns == before
    lang.cpp(source, flags="-O1").f(1)
    assert len(list(tmp_path.rglob("*.so"))) == 2
    binary.parent.chmod(0o777)
    with pytest.raises(lang.KernelError, match="others can write here"):
        lang.cpp(source).f(1)
