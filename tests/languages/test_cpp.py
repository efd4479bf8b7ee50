from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from ke_gym.languages import cpp
from ke_gym.languages.launch import KernelError
from ke_gym.languages.remarks import read_clang, read_gcc

LOOPS = r"""
#include <ke/math.h>
extern "C" void fast(const float* x, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = ke::tanh(x[i]);
}
extern "C" void slow(const float* x, float* out, int64_t n) {
  for (int64_t i = 1; i < n; ++i)
    out[i] = out[i - 1] * x[i];
}
"""


def test_a_compiler_is_found() -> None:
    assert int(cpp.compilers()["g++"].version.split(".")[0]) >= 11


def test_remarks_say_which_loops_are_vectorized() -> None:
    compiled = cpp.compile_unit(cpp.Unit(LOOPS))
    by_kernel = {remark.kernel: remark for remark in compiled.remarks}
    assert by_kernel["fast"].line == 4
    assert by_kernel["fast"].width >= 16
    assert by_kernel["fast"].to_dict()["vectorized"] is True
    assert by_kernel["slow"].line == 7
    assert by_kernel["slow"].width == 0
    assert by_kernel["slow"].message.startswith("not vectorized: ")


def test_remarks_of_both_compilers_read_alike() -> None:
    gcc = "kernel.cpp:4:3: optimized: loop vectorized using 64 byte vectors\n"
    gcc += "kernel.cpp:7:3: missed: couldn't vectorize loop\nkernel.cpp:8:5: missed: not vectorized: why\n"
    clang = (
        "kernel.cpp:4:3: remark: vectorized loop (vectorization width: 16, interleaved count: 4) [-Rpass=x]\n"
    )
    clang += "kernel.cpp:7:3: remark: loop not vectorized: why [-Rpass-analysis=loop-vectorize]\n"
    clang += "kernel.cpp:7:3: remark: loop not vectorized [-Rpass-missed=loop-vectorize]\n"
    assert read_gcc(gcc, LOOPS) == read_clang(clang, LOOPS)
    assert [(r.line, r.kernel, r.width) for r in read_gcc(gcc, LOOPS)] == [(4, "fast", 64), (7, "slow", 0)]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            'extern "C" void f(float* x) { float a[3]; for (int i = 0; i < 3; ++i) a[i] = x[i]; x[0] = a[5]; }',
            "bounds",
        ),
        ('extern "C" void f(float* x) { float a; x[0] = a; }', "uninitialized"),
        (
            'static int g(int a) { if (a > 1) return 2; }\nextern "C" void f(float* x) { x[0] = g(x[1]); }',
            "return",
        ),
        (
            'static char a[4];\nextern "C" void f(int* x) { __builtin_memset(a, x[0], 9); }',
            "out of the bounds",
        ),
        ('#error "no"\n', "no"),
        ('#include "/etc/passwd"\n', "error"),
    ],
)
def test_accesses_the_compiler_warns_of_are_errors(source: str, message: str) -> None:
    with pytest.raises(cpp.CompileError, match=message):
        cpp.compile_unit(cpp.Unit(source))


def test_the_log_is_short_and_starts_with_the_first_error() -> None:
    source = "".join(f'extern "C" void f{i}(int a) {{ missing{i}(); }}\n' for i in range(200))
    with pytest.raises(cpp.CompileError) as caught:
        cpp.compile_unit(cpp.Unit(source))
    lines = str(caught.value).splitlines()
    assert "missing0" in lines[0]
    assert len(lines) <= 30


def test_a_compiler_that_does_not_end_is_stopped() -> None:
    bomb = "template<int N, int M> struct S { enum { v = S<N - 1, 2 * M>::v + S<N - 1, 2 * M + 1>::v }; };\n"
    bomb += "template<int M> struct S<0, M> { enum { v = 1 }; };\n"
    bomb += 'extern "C" void f(int* x) { x[0] = S<27, 0>::v; }\n'
    with pytest.raises(cpp.CompileError, match=r"took longer than 0\.5 s"):
        cpp.compile_unit(cpp.Unit(bomb), seconds=0.5)


@pytest.mark.parametrize(
    "flags", ["-O2 -fno-unroll-loops", ["-mprefer-vector-width=256", "-DTILE=8"], "--param x=1"]
)
def test_flags_are_kept(flags: str | list[str]) -> None:
    assert " ".join(cpp.parse_flags(flags)).replace("--param=", "--param ") == (
        flags if isinstance(flags, str) else " ".join(flags)
    )


@pytest.mark.parametrize(
    "flag",
    ["-fplugin=evil.so", "-Wl,-rpath=/tmp", "-Wp,-MD,x", "-Wa,-x", "-I/etc", "-include x", "-B/tmp", "@file",
     "x.cpp", "-fprofile-use=/x", "-fdump-tree-all", "-specs=x", "-o x", "-fno-openmp", "-fopt-info-vec=x",
     "-L/tmp", "-lm", "-fsanitize=address", "--sysroot=/", "-wrapper x"],
)  # fmt: skip
def test_flags_that_reach_elsewhere_are_refused(flag: str) -> None:
    with pytest.raises(KernelError, match="is not accepted"):
        cpp.parse_flags(flag)


def test_unknown_and_missing_compilers() -> None:
    with pytest.raises(KernelError, match="compiler 'icc' is unknown"):
        cpp.compile_unit(cpp.Unit(LOOPS, (), "icc"))
    if "clang++" not in cpp.compilers():
        with pytest.raises(KernelError, match=r"'clang\+\+' is not installed here; found: g\+\+"):
            cpp.compile_unit(cpp.Unit(LOOPS, (), "clang++"))


def test_fast_math_does_not_flush_subnormals_of_the_process(tmp_path: Path) -> None:
    path = tmp_path / "fast.so"
    path.write_bytes(cpp.compile_unit(cpp.Unit(LOOPS, ("-ffast-math",))).binary)
    ctypes.CDLL(str(path))
    tiny = torch.full((1,), 1e-40)
    assert (tiny * 0.5).item() > 0


def openmp_libraries() -> set[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[-1] for line in lines if "libgomp" in line}


def test_kernels_share_the_thread_pool_of_torch(tmp_path: Path) -> None:
    source = '#include <omp.h>\nextern "C" void threads(int* out) { out[0] = omp_get_max_threads(); }'
    path = tmp_path / "threads.so"
    path.write_bytes(cpp.compile_unit(cpp.Unit(source)).binary)
    pools = openmp_libraries()
    library = ctypes.CDLL(str(path))
    assert openmp_libraries() == pools, "a pool of its own"
    out = (ctypes.c_int * 1)()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            library.threads(out)
            assert out[0] == threads
    finally:
        torch.set_num_threads(before)


def test_units_are_named_by_content() -> None:
    assert cpp.Unit(LOOPS).name == cpp.Unit(LOOPS).name
    assert len({cpp.Unit(LOOPS).name, cpp.Unit(LOOPS, ("-O2",)).name, cpp.Unit(LOOPS + " ").name}) == 3
    assert cpp.compile_unit(cpp.Unit(LOOPS)).binary == cpp.compile_unit(cpp.Unit(LOOPS + "// end\n")).binary
