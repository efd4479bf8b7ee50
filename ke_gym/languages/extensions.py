"""Extensions that kernel modules build with torch's ``load_inline``: compiled here, imported by who runs them.

Torch's own way needs ninja, lock files and a home directory, which a sandbox does not have. So the sources that it
would write are given to the compilers directly, with its flags.
"""

from __future__ import annotations

import inspect
import os
import shlex
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn
from unittest import mock

import torch

from ke_gym.languages import cpp, nvrtc, recording
from ke_gym.languages.errors import BuildError
from ke_gym.languages.launch import KernelError
from ke_gym.languages.recording import Built
from ke_gym.languages.trace import NotTraceable

_NVCC_FLAGS = (
    "-D__CUDA_NO_HALF_OPERATORS__", "-D__CUDA_NO_HALF_CONVERSIONS__", "-D__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-D__CUDA_NO_HALF2_OPERATORS__", "--expt-relaxed-constexpr", "--compiler-options", "-fPIC",
)  # fmt: skip
_IGNORED = ("build_directory", "verbose", "keep_intermediates", "use_pch")
_CUDA_HEADERS = ("torch/types.h", "cuda.h", "cuda_runtime.h")


@dataclass(frozen=True)
class Extension:
    """A compiled extension as a unit of an artifact, under the name that the module gave it."""

    name: str
    built: Built

    def build(self, seconds: float, arch: str) -> Built:
        """See ``recording.Unit``."""
        return self.built


class StandIn:
    """What a module gets for an extension while it is traced: calling any of its ``functions`` ends the trace.

    Without ``functions`` the source binds its own, whose names are not known: every name is one.
    """

    def __init__(self, name: str, functions: Iterable[str] | None = None) -> None:
        self.__name__ = name
        self._functions = None if functions is None else tuple(functions)

    def __getattr__(self, function: str) -> Callable[..., NoReturn]:
        unknown = self._functions is not None and function not in self._functions
        if function.startswith("__") or unknown:
            raise AttributeError(f"extension {self.__name__!r} has no function {function!r}")

        def call(*args: Any, **kwargs: Any) -> NoReturn:
            raise NotTraceable(f"it calls {self.__name__}.{function}, which load_inline built")

        return call


def mentioned(source: str) -> bool:
    """Whether a module can build extensions. Torch's part for it is imported only then: that takes a while."""
    return "cpp_extension" in source


@contextmanager
def building(source: str, arch: str, seconds: float) -> Iterator[AbstractContextManager[None]]:
    """While the module ``source`` is loaded and traced: ``load_inline`` compiles, and returns a ``StandIn``.

    ``arch`` is the GPU's, "" for a CPU; one compiler may take ``seconds``. What is built is registered as a unit
    (``recording.register``). Raises ``BuildError`` in the module for what cannot be built, and once more at the end of
    the context that it yields: catching it must not undo it.
    """
    if not mentioned(source):
        yield nullcontext()
        return
    from torch.utils import cpp_extension

    workshop = _Workshop(inspect.signature(cpp_extension.load_inline), arch, seconds)
    with (
        mock.patch.object(cpp_extension, "load_inline", workshop.load_inline),
        mock.patch.object(cpp_extension, "load", workshop.load),
    ):
        yield workshop.checked()


def prebuilt(paths: Mapping[str, str]) -> None:
    """From now on ``load_inline`` imports the library of that name in ``paths``; this process compiles nothing.

    It raises ``KernelError`` for a name that is not there.
    """
    from torch.utils import cpp_extension

    imported: dict[str, ModuleType] = {}

    def load_inline(name: str, *args: Any, **kwargs: Any) -> ModuleType:
        if name not in paths:
            raise KernelError(
                f"extension {name!r} was not there when the module was built: load_inline is given the same name always"
            )
        if name not in imported:
            imported[name] = _imported(name, paths[name])
        return imported[name]

    cpp_extension.load_inline = load_inline


def _imported(name: str, path: str) -> ModuleType:
    loader = ExtensionFileLoader(name, path)
    spec = spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


class _Workshop:
    """What takes the place of torch's functions while one module is built."""

    def __init__(self, signature: inspect.Signature, arch: str, seconds: float) -> None:
        self._signature = signature
        self._arch = arch
        self._seconds = seconds
        self._known: dict[str, tuple[str, StandIn]] = {}
        self._failure: BuildError | None = None

    @contextmanager
    def checked(self) -> Iterator[None]:
        try:
            yield
        finally:
            if self._failure is not None:
                raise self._failure

    def load(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise self._failed(
            BuildError("constraints", "cpp_extension.load compiles files, a module has none: use load_inline")
        )

    def load_inline(self, *args: Any, **kwargs: Any) -> StandIn:
        given = self._signature.bind(*args, **kwargs)
        given.apply_defaults()
        try:
            return self._made(given.arguments)
        except BuildError as error:
            self._failed(error)
            raise

    def _failed(self, error: BuildError) -> BuildError:
        self._failure = self._failure or error
        return error

    def _made(self, given: Mapping[str, Any]) -> StandIn:
        name, asked = given["name"], repr({key: value for key, value in given.items() if key not in _IGNORED})
        if not isinstance(name, str) or not name.isidentifier() or not name.isascii():
            raise BuildError(
                "constraints", f"load_inline: {name!r} is no name of a module; give an identifier"
            )
        if name in self._known:
            before, made = self._known[name]
            if asked != before:  # a ModelNew that builds its own asks the same for each set of shapes
                raise BuildError("constraints", f"load_inline: two extensions are named {name!r}")
            return made
        functions = _functions(given["functions"])
        recording.register(Extension(name, _compile(name, given, functions, self._arch, self._seconds)))
        made = StandIn(name, functions)
        self._known[name] = asked, made
        return made


def _functions(functions: Any) -> dict[str, str] | None:
    """Names and docstrings, as torch reads them."""
    if functions is None or isinstance(functions, dict):
        return functions
    if not isinstance(functions, (str, list)):
        raise ValueError(f"load_inline: functions are a list or dict, not a {type(functions).__name__}")
    return {name: name for name in ([functions] if isinstance(functions, str) else functions)}


def _compile(
    name: str, given: Mapping[str, Any], functions: Mapping[str, str] | None, arch: str, seconds: float
) -> Built:
    if given.get("sycl_sources") or given.get("with_sycl"):
        raise BuildError(
            "constraints", "load_inline: SYCL is not supported; give cpp_sources or cuda_sources"
        )
    if not given["is_python_module"]:
        raise BuildError(
            "constraints", "load_inline: is_python_module=False is not supported; bind functions"
        )
    cuda = bool(given["cuda_sources"]) or bool(given["with_cuda"])
    if cuda and not arch:
        raise BuildError("constraints", "load_inline: cuda_sources are for a GPU, the target is a CPU")
    nvcc = _nvcc() if cuda else ""
    compiler = _gcc()
    common = [f"-DTORCH_EXTENSION_NAME={name}", "-DTORCH_API_INCLUDE_EXTENSION_H"]
    common += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    common += [f"-I{path}" for path in _texts(given["extra_include_paths"])]
    for path in (*_headers(), *_toolkit(nvcc, "include")):
        common += ["-isystem", path]
    flags = ["-fPIC", "-std=c++20", *_words(given["extra_cflags"])]
    implicit = not given.get("no_implicit_headers")
    with tempfile.TemporaryDirectory(prefix="ke_gym_") as folder:
        Path(folder, "main.cpp").write_text(_main(given, functions, implicit), encoding="utf-8")
        jobs = [[compiler, *common, *flags, "-c", "main.cpp", "-o", "main.o"]]
        if given["cuda_sources"]:
            headers = [f"#include <{header}>" for header in _CUDA_HEADERS if implicit]
            text = "\n".join([*headers, *_texts(given["cuda_sources"])])
            Path(folder, "cuda.cu").write_text(text, encoding="utf-8")
            cuda_flags = _cuda_flags(_words(given["extra_cuda_cflags"]), arch)
            jobs.append([nvcc, *common, *cuda_flags, "-c", "cuda.cu", "-o", "cuda.o"])
            flags += cuda_flags
        objects = [job[-1] for job in jobs]
        linked = [compiler, *objects, "-shared", *_words(given["extra_ldflags"]), *_libraries(nvcc)]
        try:
            with ThreadPoolExecutor(len(jobs)) as pool:
                list(pool.map(lambda job: cpp._execute(job, folder, seconds), jobs))
            cpp._execute([*linked, "-o", "extension.so"], folder, seconds)
        except KernelError as error:
            raise BuildError("compile", f"load_inline: extension {name!r}: {error}") from error
        binary = Path(folder, "extension.so").read_bytes()
    return Built(binary, settings={"compiler": "nvcc" if cuda else "g++", "flags": flags})


def _main(given: Mapping[str, Any], functions: Mapping[str, str] | None, implicit: bool) -> str:
    """main.cpp as torch writes it."""
    lines = ["#include <torch/extension.h>"] if implicit else []
    lines += _texts(given["cpp_sources"])
    if functions is not None:
        handled = given.get("with_pytorch_error_handling", True)
        lines.append("PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {")
        for function, told in functions.items():
            bound = f"torch::wrap_pybind_function({function})" if handled else function
            lines.append(f'm.def("{function}", {bound}, "{told}");')
        lines.append("}")
    return "\n".join(lines)


def _texts(sources: Any) -> list[str]:
    return [sources] if isinstance(sources, str) else list(sources or ())


def _words(flags: Any) -> list[str]:
    """Flags as torch's build file has them: a shell splits them."""
    return shlex.split(" ".join(_texts(flags)))


def _cuda_flags(given: list[str], arch: str) -> list[str]:
    flags = [*_NVCC_FLAGS]
    if not any("arch" in flag for flag in given):
        flags.append(f"-gencode=arch=compute_{arch.removeprefix('sm_')},code={arch}")
    flags += given
    return flags if any(flag.startswith("-std=") for flag in given) else [*flags, "-std=c++20"]


def _headers() -> list[str]:
    """Torch's and Python's. Raises ``BuildError`` where these are not installed."""
    root = Path(torch.__file__).parent / "include"
    python = sysconfig.get_path("include", scheme="posix_prefix")
    if not Path(python, "Python.h").exists():
        raise BuildError(
            "constraints",
            f"load_inline needs Python's headers, and {python} has no Python.h: install them (python3-dev), or write "
            "kernels with ke_gym.lang, which needs none",
        )
    return [str(root), str(root / "torch/csrc/api/include"), python]


def _libraries(nvcc: str) -> list[str]:
    """What torch links. A torch without CUDA has no CUDA libraries: whoever loads the extension has them."""
    folder = Path(torch.__file__).parent / "lib"
    names = ["c10", "torch_cpu", "torch", "torch_python"]
    cuda = ["c10_cuda", "torch_cuda"] if nvcc else []
    names += [name for name in cuda if (folder / f"lib{name}.so").exists()]
    found = [f"-L{folder}", *(f"-l{name}" for name in names)]
    return [*found, *(f"-L{path}" for path in _toolkit(nvcc, "lib64")), "-lcudart"] if nvcc else found


def _gcc() -> str:
    path = cpp._which("g++")
    if path is None:
        raise BuildError("constraints", "load_inline needs g++, and there is none on the PATH: install g++")
    return path


def _nvcc() -> str:
    named = [str(root / "bin" / "nvcc") for root in nvrtc.named_toolkits()]
    found = next((path for path in named if os.access(path, os.X_OK)), "") or nvrtc.nvcc()
    if not found:
        raise BuildError(
            "constraints",
            f"load_inline needs nvcc for cuda_sources, and there is none on the PATH or in {nvrtc.TOOLKIT}/bin: install the "
            "CUDA toolkit, or write the kernels with lang.cuda, which needs no nvcc",
        )
    return found


def _toolkit(nvcc: str, folder: str) -> list[str]:
    """Such folders of nvcc's toolkit, or of the one in the usual place where its nvcc is called by a script."""
    roots = [Path(nvcc).resolve().parents[1], nvrtc.TOOLKIT] if nvcc else []
    # Compilers look into /usr anyway, in an order of their own.
    roots = [root for root in roots if root != Path("/usr")]
    if root := next((root for root in roots if (root / "include" / "cuda_runtime.h").exists()), None):
        return [str(root / folder)] if (root / folder).is_dir() else []
    return []
