"""CUDA C++ → cubin: NVRTC in this process, or nvcc. Neither needs a GPU; neither sees torch's headers."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import site
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from ke_gym.languages.launch import KernelError

TOOLS = ("nvrtc", "nvcc")
TOOLKIT = Path("/usr/local/cuda")
"""Where CUDA's toolkit usually lies."""
FLAGS = ("--std=c++17", "-default-device", "--extra-device-vectorization")
SOURCE_NAME = "kernel.cu"
_ERROR_LINES = 30
_ACCEPTED = re.compile(
    r"(-D|-U|-std=|--std=|--use_fast_math$|-use_fast_math$|-maxrregcount=|--maxrregcount=|-lineinfo$|--fmad=|-fmad="
    r"|--ftz=|-ftz=|--prec-div=|-prec-div=|--prec-sqrt=|-prec-sqrt=)"
)


def parse_flags(flags: str | Sequence[str]) -> tuple[str, ...]:
    """The flags as a tuple. Raises ``KernelError`` for one that is not about the code."""
    words = tuple(flags.split()) if isinstance(flags, str) else tuple(map(str, flags))
    for flag in words:
        if not _ACCEPTED.match(flag):
            raise KernelError(
                f"compiler flag {flag!r} is not accepted; give -D…, -U…, -std=…, -use_fast_math, -maxrregcount=…, "
                "-lineinfo, -fmad=…, -ftz=…, -prec-div=… or -prec-sqrt=…"
            )
    return words


def tools() -> tuple[str, ...]:
    """Which of ``TOOLS`` are at hand."""
    found = ["nvrtc"] if _library() else []
    return (*found, "nvcc") if nvcc() else tuple(found)


def compile_cubin(
    source: str, flags: Sequence[str], arch: str, tool: str = "", seconds: float = 60.0
) -> tuple[bytes, str]:
    """The cubin and what the compiler said. ``tool`` "" takes what is there, NVRTC first.

    Raises ``KernelError`` with the first errors. Only nvcc is stopped after ``seconds``: NVRTC works in this
    process, which the compile sandbox limits.
    """
    if tool and tool not in TOOLS:
        raise KernelError(f"compiler {tool!r} is unknown; there are {' and '.join(TOOLS)}")
    there = tools()
    chosen = tool or next(iter(there), "")
    if chosen not in there:
        missing = f"compiler {tool!r} is" if tool else "no compiler for CUDA C++ is"
        raise KernelError(f"{missing} installed here: pip install 'ke-gym[cuda]', or put nvcc on the PATH")
    if chosen == "nvcc":
        return _with_nvcc(source, flags, arch, seconds)
    return _with_nvrtc(source, flags, arch)


# ------------------------------------------------------------------------------------------------ NVRTC


def _packages() -> list[Path]:
    """Folders in which NVIDIA's wheels lie."""
    roots = [*site.getsitepackages(), site.getusersitepackages(), *sys.path]
    folders = [Path(root, "nvidia") for root in dict.fromkeys(roots) if root]
    return [
        folder for parent in folders if parent.is_dir() for folder in sorted(parent.iterdir(), reverse=True)
    ]


def named_toolkits() -> list[Path]:
    """Those that the user names."""
    return [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]


def _toolkits() -> list[Path]:
    found = [*named_toolkits(), TOOLKIT]
    if compiler := nvcc():
        found.append(Path(compiler).resolve().parents[1])
    return [folder for folder in dict.fromkeys(found) if folder.is_dir()]


@functools.cache
def _library() -> str:
    """The path of libnvrtc; "" if there is none."""
    places = [*(p / "lib" for p in _packages()), *(t / "lib64" for t in _toolkits())]
    for place in places:
        found = sorted(place.glob("libnvrtc.so.*"), reverse=True)
        if found:
            return str(found[0])
    return ""


@functools.cache
def _includes() -> tuple[str, ...]:
    """Where cuda_fp16.h and its kin lie: a toolkit, or the wheels of the CUDA runtime."""
    places = [*(p / "include" for p in _packages()), *(t / "include" for t in _toolkits())]
    headers = [p for p in places if (p / "cuda_fp16.h").exists() or (p / "nv" / "target").exists()]
    cccl = [p / "cccl" for p in places if (p / "cccl" / "nv" / "target").exists()]
    return tuple(str(p) for p in dict.fromkeys((*headers, *cccl)))


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    path = Path(_library())
    # It opens this one by its bare name, which is found only if it is loaded already.
    for builtins in sorted(path.parent.glob("libnvrtc-builtins.so.*"))[:1]:
        ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(path))
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


def _call(name: str, *arguments: object) -> None:
    library = _nvrtc()
    if code := getattr(library, name)(*arguments):
        told = (library.nvrtcGetErrorString(code) or b"?").decode()
        raise KernelError(f"{name}: {told}")


def _read(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    _call(f"nvrtcGet{what}", program, buffer)
    return buffer.raw


@functools.cache
def _known() -> frozenset[str]:
    """The architectures that this NVRTC compiles for, without their suffixes."""
    count = ctypes.c_int()
    _call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
    found = (ctypes.c_int * count.value)()
    _call("nvrtcGetSupportedArchs", found)
    return frozenset(f"sm_{number}" for number in found)


def _with_nvrtc(source: str, flags: Sequence[str], arch: str) -> tuple[bytes, str]:
    if arch.rstrip("af") not in _known():
        raise KernelError(
            f"the NVRTC that is installed here does not know {arch} ({_library()}); install one of a newer CUDA:"
            " pip install --upgrade 'ke-gym[cuda]'"
        )
    program = ctypes.c_void_p()
    _call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), SOURCE_NAME.encode(), 0, None, None)
    try:
        options = [f"--gpu-architecture={arch}", *FLAGS, *(f"-I{p}" for p in _includes()), *flags]
        encoded = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
        code = _nvrtc().nvrtcCompileProgram(program, len(options), encoded)
        log = _read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        if code:
            told = (_nvrtc().nvrtcGetErrorString(code) or b"?").decode()
            raise KernelError(_first_errors(log.splitlines()) or f"NVRTC: {told}")
        return _read(program, "CUBIN"), log
    finally:
        _nvrtc().nvrtcDestroyProgram(ctypes.byref(program))


# ------------------------------------------------------------------------------------------------- nvcc


def nvcc() -> str:
    """The compiler on the PATH, or in the usual place; "" if there is none."""
    return shutil.which("nvcc") or shutil.which(str(TOOLKIT / "bin" / "nvcc")) or ""


def _with_nvcc(source: str, flags: Sequence[str], arch: str, seconds: float) -> tuple[bytes, str]:
    with tempfile.TemporaryDirectory(prefix="ke_gym_") as folder:
        Path(folder, SOURCE_NAME).write_text(source, encoding="utf-8")
        code = f"-gencode=arch=compute_{arch.removeprefix('sm_')},code={arch}"
        command = [nvcc(), "-cubin", code, "-O3", "--std=c++17", "--extra-device-vectorization", *flags]
        try:
            done = subprocess.run(
                [*command, SOURCE_NAME, "-o", "kernel.cubin"],
                cwd=folder,
                env={**os.environ, "TMPDIR": folder, "LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            raise KernelError(f"the compiler took longer than {seconds:g} s") from None
        log = (done.stdout + done.stderr).decode(errors="replace")
        if done.returncode:
            raise KernelError(_first_errors(log.splitlines()) or f"nvcc ended with code {done.returncode}")
        return Path(folder, "kernel.cubin").read_bytes(), log


def _first_errors(lines: Iterable[str]) -> str:
    """The errors with the source below them; warnings are dropped."""
    kept: list[str] = []
    keeping = False
    for line in lines:
        if re.search(r"\): (error|warning|catastrophic error)|^\w+ *: ", line):
            keeping = "error" in line
        if keeping and line.strip():
            kept.append(line[:200])
    return "\n".join((kept or [line[:200] for line in lines if line.strip()])[:_ERROR_LINES])
