"""C++ for the CPU: compilers, flags, and source → shared library in under a second (no torch headers)."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ke_gym.files import write_whole
from ke_gym.languages.launch import KernelError
from ke_gym.languages.recording import Built
from ke_gym.languages.remarks import Remark, read_clang, read_gcc

INCLUDE = Path(__file__).parent / "include"
SOURCE_NAME = "kernel.cpp"

# Infinities, NaN and signed zeros keep their meaning: only errno and floating-point traps, which no kernel
# observes, are given up. Sums are reordered only where the source says so (`#pragma omp simd reduction`).
CODE_FLAGS = (
    "-std=c++20", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math",
    "-ffp-contract=fast", "-fPIC", "-fno-stack-protector", "-fno-plt",
)  # fmt: skip
# An access the compiler is sure about is an error, not a remark: at run time it would be somebody's memory.
_FATAL = ("array-bounds", "uninitialized", "return-type", "div-by-zero", "shift-count-overflow")
_FATAL_GCC = (
    "stringop-overflow",
    "stringop-overread",
    "aggressive-loop-optimizations",
    "free-nonheap-object",
)
WARNINGS = ("-Wall", "-Wno-unknown-pragmas", "-Wno-unused-variable", "-Wno-unused-but-set-variable")

_ACCEPTED = re.compile(r"-(O|f|m|D|U|std=|W(?![apl],)|-param)")
# Accepted prefixes that load code, read or write files, or swap the runtime.
_REFUSED = re.compile(
    r"-f(plugin|profile|auto-profile|branch-probabilities|dump|opt-info|save-|sanitize|lto|callgraph|stack-usage"
    r"|compare-debug|diagnostics|working-directory|crash|pass-plugin|module|coverage|openmp|no-openmp|no-pic|no-PIC)"
    r"|-m(32|x32|16|llvm|cmodel|dll)|--param=?$"
)
# With these, GCC before 13 links start-up code that turns subnormals off for the whole process.
_UNSAFE_LINK = ("-ffast-math", "-Ofast", "-funsafe-math-optimizations")

_NAMES = {
    "g++": ("g++", *(f"g++-{v}" for v in range(16, 10, -1))),
    "clang++": ("clang++", *(f"clang++-{v}" for v in range(23, 12, -1))),
}
_ERROR_LINES = 30


class CompileError(KernelError):
    """The compiler refused the source; the message is its first errors."""


@dataclass(frozen=True)
class Unit:
    """One C++ source with its flags and compiler family; compiles into one binary."""

    source: str
    flags: tuple[str, ...] = ()
    compiler: str = "g++"

    @functools.cached_property
    def name(self) -> str:
        """What plans call the binary: a hash of the unit."""
        text = "\0".join((self.compiler, *self.flags, self.source))
        return f"cpp_{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def build(self, seconds: float, arch: str) -> Built:
        """See ``recording.Unit``; compiled for the processor of this machine."""
        compiled = compile_unit(self, seconds)
        remarks = tuple(remark.to_dict() for remark in compiled.remarks)
        return Built(compiled.binary, compiled.warnings, remarks, settings(self))


@dataclass(frozen=True)
class Compiler:
    """A compiler found on this machine. ``family`` is "g++" or "clang++"."""

    family: str
    path: str
    version: str


@dataclass(frozen=True)
class Compiled:
    """A shared library, and what the compiler said about it."""

    binary: bytes
    warnings: tuple[str, ...]
    remarks: tuple[Remark, ...]


@functools.cache
def compilers() -> dict[str, Compiler]:
    """The usable compilers by family. Clang is offered only if a probe with OpenMP links."""
    found = {}
    for family in _NAMES:
        if (path := _which(family)) is None:
            continue
        version = subprocess.run(
            [path, "-dumpfullversion", "-dumpversion"], capture_output=True, text=True
        ).stdout
        if family == "g++" or _links_openmp(path):
            found[family] = Compiler(family, path, version.strip())
    return found


def _which(family: str) -> str | None:
    return next((path for name in _NAMES.get(family, ()) if (path := shutil.which(name))), None)


def _links_openmp(path: str) -> bool:
    program = '#include <omp.h>\nextern "C" int threads() { return omp_get_max_threads(); }\n'
    with tempfile.TemporaryDirectory() as folder:
        command = [path, "-fopenmp", "-shared", "-fPIC", "-x", "c++", "-", "-o", f"{folder}/probe.so"]
        return subprocess.run(command, input=program.encode(), capture_output=True).returncode == 0


def parse_flags(flags: str | list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """The flags as a tuple. Raises ``KernelError`` for one that is not about code or warnings."""
    words = shlex.split(flags) if isinstance(flags, str) else [str(flag) for flag in flags]
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] == "--param":
            joined[-1] = f"--param={word}"
        else:
            joined.append(word)
    for flag in joined:
        if not _ACCEPTED.match(flag) or _REFUSED.match(flag):
            raise KernelError(
                f"compiler flag {flag!r} is not accepted; give flags that start with -O, -f, -m, -D, -U, "
                "-std=, --param or -W and read or write no file"
            )
    return tuple(joined)


def _find(family: str) -> str:
    """The path of a compiler; cheap, since a compile sandbox asks afresh each time."""
    if family not in _NAMES:
        raise KernelError(f"compiler {family!r} is unknown; there are {' and '.join(_NAMES)}")
    path = _which(family)
    if path is None:
        others = ", ".join(sorted(compilers())) or "none"
        raise KernelError(f"compiler {family!r} is not installed here; found: {others}")
    return path


def compile_unit(unit: Unit, seconds: float = 60.0) -> Compiled:
    """Compile; raises ``CompileError`` with the first errors, or when it takes longer than ``seconds``."""
    path, gcc = _find(unit.compiler), unit.compiler == "g++"
    with tempfile.TemporaryDirectory(prefix="ke_gym_") as folder:
        Path(folder, SOURCE_NAME).write_text(unit.source, encoding="utf-8")
        remarks_flags = ("-fopt-info-vec-optimized-missed=remarks",) if gcc else _CLANG_REMARKS
        fatal = [f"-Werror={name}" for name in (*_FATAL, *(_FATAL_GCC if gcc else ()))]
        command = [
            path,
            *CODE_FLAGS,
            *WARNINGS,
            *unit.flags,
            *fatal,
            *remarks_flags,
            "-I",
            str(INCLUDE),
            SOURCE_NAME,
        ]
        if set(unit.flags) & set(_UNSAFE_LINK):
            said = _execute([*command, "-c", "-o", "kernel.o"], folder, seconds)
            _execute([path, "-shared", "-fopenmp", "kernel.o", "-o", "kernel.so"], folder, seconds)
        else:
            said = _execute([*command, "-shared", "-o", "kernel.so"], folder, seconds)
        if gcc:
            written = Path(folder, "remarks")
            remarks = read_gcc(written.read_text(errors="replace") if written.exists() else "", unit.source)
        else:
            remarks = read_clang(said, unit.source)
        warnings = tuple(line for line in said.splitlines() if ": warning: " in line)
        return Compiled(Path(folder, "kernel.so").read_bytes(), warnings[:20], remarks)


_CLANG_REMARKS = (
    "-Rpass=loop-vectorize", "-Rpass-missed=loop-vectorize", "-Rpass-analysis=loop-vectorize",
    "-fno-caret-diagnostics",
)  # fmt: skip


def _execute(command: list[str], folder: str, seconds: float) -> str:
    environment = {**os.environ, "TMPDIR": folder, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        raise CompileError(f"the compiler took longer than {seconds:g} s") from None
    said = done.stderr.decode(errors="replace")
    if done.returncode:
        raise CompileError(
            _first_errors(said) or f"the compiler ended with code {done.returncode} and said nothing"
        )
    return said


def _first_errors(said: str) -> str:
    """The errors, each with the source lines below it; notes, warnings and everything late are dropped."""
    kept: list[str] = []
    keeping = False
    for line in said.splitlines():
        if re.match(r"\S+:(\d+:)* ", line) or line.startswith(("In file", "cc1plus", "collect2", "/")):
            keeping = any(words in line for words in ("error", "undefined reference", "cannot find"))
        if keeping:
            kept.append(line[:200])
    return "\n".join((kept or said.splitlines())[:_ERROR_LINES])


def cached(unit: Unit) -> str:
    """The path of the unit's binary in this user's cache folder, compiled if it is not there yet.

    The name covers source, flags, compiler, headers and processor, so that nothing stale is ever loaded.
    """
    path = _find(unit.compiler)
    identity = f"{path} {Path(path).stat().st_mtime_ns} {environment_id()} {unit.name}"
    target = _cache() / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.so"
    if not target.exists():
        write_whole(target, compile_unit(unit).binary)
    return str(target)


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(root, "ke_gym", "kernels")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        owned = folder.stat().st_uid == os.getuid() and not folder.stat().st_mode & 0o022
    except OSError as error:
        raise KernelError(
            f"{folder}: no place to keep compiled kernels ({error}); set XDG_CACHE_HOME"
        ) from error
    if not owned:
        raise KernelError(
            f"{folder}: others can write here, so kernels are not loaded from it; set XDG_CACHE_HOME"
        )
    return folder


@functools.cache
def environment_id() -> str:
    """A hash of what every unit is compiled with here: our flags, our headers, the processor."""
    digest = hashlib.sha256(f"{CODE_FLAGS} {_processor()}".encode())
    for path in sorted(INCLUDE.rglob("*.h")):
        digest.update(path.relative_to(INCLUDE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@functools.cache
def _processor() -> str:
    """What ``-march=native`` depends on."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        import platform

        return platform.processor()
    keys = ("vendor_id", "cpu family", "model", "stepping", "flags", "Features", "CPU part")
    lines: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in keys:
            lines.setdefault(key.strip(), value.strip())
    return hashlib.sha256(repr(sorted(lines.items())).encode()).hexdigest()[:16]


def settings(unit: Unit) -> dict[str, Any]:
    """How a unit is compiled on this machine, JSON-able."""
    return {"compiler": unit.compiler, "flags": [*CODE_FLAGS, *unit.flags], "processor": _processor()}
