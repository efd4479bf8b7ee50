"""Extensions of Python's C interface alone: they build in a second, where torch's headers take half a minute."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension

from ke_gym.languages import cpp, extensions, nvrtc
from ke_gym.languages.artifact import Artifact
from ke_gym.languages.base import BuildError, BuildOptions, Signature, build
from ke_gym.languages.launch import KernelError
from ke_gym.languages.module import load
from ke_gym.languages.plan import TensorSpec
from tests.machine import PYTHON_HEADERS

pytestmark = PYTHON_HEADERS
SPEC = TensorSpec((4, 4), (4, 1), "float32")
SIGNATURE = Signature("t", {"cpu": (SPEC,)}, {"cpu": (SPEC,)}, {"cpu": {}}, {"cpu": {}}, {"cpu": ()})

SOURCE = '''
import torch
from torch.utils.cpp_extension import load_inline

SOURCE = r"""
#include <Python.h>
static PyObject* same(PyObject*, PyObject* x) { return Py_NewRef(x); }
static PyMethodDef methods[] = {{"same", same, METH_O, ""}, {}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "plain", "", -1, methods};
PyMODINIT_FUNC PyInit_plain() { return PyModule_Create(&module); }
"""
plain = load_inline("plain", SOURCE, extra_cflags=["-O1 -DUNUSED='1'"], no_implicit_headers=True)

class ModelNew(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.plain = plain

    def forward(self, x):
        return self.plain.same(x)
'''


@functools.cache
def built(source: str = SOURCE) -> Artifact:
    return build(source, SIGNATURE)


def fails(source: str, language: str = "cpp") -> BuildError:
    with pytest.raises(BuildError) as failure:
        build(source, SIGNATURE, language, BuildOptions("cuda" if language == "cuda" else "cpu"))
    return failure.value


def changed(old: str, new: str) -> str:
    assert old in SOURCE
    return SOURCE.replace(old, new)


def test_a_call_of_an_extension_goes_to_the_host_lane() -> None:
    artifact = built()
    assert (artifact.lane, set(artifact.binaries)) == ("host", {"plain"})
    assert artifact.report["host_reason"] == "it calls plain.same, which load_inline built"
    (unit,) = artifact.report["units"]
    assert (unit["name"], unit["compiler"], unit["flags"][-2:]) == ("plain", "g++", ["-O1", "-DUNUSED=1"])
    assert Artifact.from_bytes(artifact.to_bytes()) == artifact


def test_what_was_built_is_imported_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_extension, "load_inline", None)  # put back after the test
    path = tmp_path / "plain.so"
    path.write_bytes(built().binaries["plain"])
    extensions.prebuilt({"plain": str(path)})
    x = torch.ones(4, 4)
    assert load(SOURCE).ModelNew()(x) is x
    with pytest.raises(KernelError, match="'other' was not there when"):
        load(changed('load_inline("plain"', 'load_inline("other"'))


def test_torch_has_its_own_functions_back() -> None:
    before = cpp_extension.load_inline, cpp_extension.load
    built(changed("self.plain.same(x)", "x + 1"))
    assert (cpp_extension.load_inline, cpp_extension.load) == before


def test_a_module_that_does_not_call_its_extension_is_a_plan() -> None:
    artifact = built(changed("self.plain.same(x)", "x + 1"))
    assert (artifact.lane, dict(artifact.binaries)) == ("plan", {})


def test_each_model_may_build_its_own() -> None:
    two = Signature(
        "t", {"cpu": (SPEC,), "two": (SPEC,)}, {"cpu": (SPEC,), "two": (SPEC,)}, {"cpu": {}, "two": {}},
        {"cpu": {}, "two": {}}, {"cpu": (), "two": ()},
    )  # fmt: skip
    again = 'self.plain = load_inline("plain", SOURCE, no_implicit_headers=True)'
    source = changed("plain = load_inline", "unused = lambda: load_inline").replace(
        "self.plain = plain", again
    )
    assert build(source.replace("self.plain.same(x)", "x + 1"), two).lane == "plan"


@pytest.mark.parametrize(
    ("old", "new", "outcome", "words"),
    [
        ("Py_NewRef(x)", "Py_NewRef(y)", "compile", "main.cpp:3:66: error: 'y' was not declared"),
        ("Py_NewRef(x)", "missing(x)", "compile", "'missing' was not declared"),
        (
            '"plain", SOURCE,',
            '"plain", SOURCE, extra_ldflags=["-lnowhere"],',
            "compile",
            "cannot find -lnowhere",
        ),
        ('load_inline("plain"', 'load_inline("no-name"', "constraints", "'no-name' is no name"),
        ("import load_inline", "import load as load_inline", "constraints", "use load_inline"),
        ('"plain", SOURCE,', '"plain", SOURCE, "x",', "constraints", "for a GPU, the target is a CPU"),
        ('"plain", SOURCE,', '"plain", SOURCE, is_python_module=False,', "constraints", "bind functions"),
        ("\nclass", "\nplain.same(1)\nclass", "constraints", "it calls plain.same, which load_inline built"),
        (
            "\nclass",
            '\nload_inline("plain", "int x;")\nclass',
            "constraints",
            "two extensions are named 'plain'",
        ),
    ],
)
def test_what_cannot_be_built_is_said(old: str, new: str, outcome: str, words: str) -> None:
    source = changed(old, new)
    error = fails(source)
    assert error.outcome == outcome and words in error.log


def test_what_fails_on_a_hidden_shape_set_does_not_say_what_it_is() -> None:
    specs = {"cpu": (SPEC,), "ragged": (SPEC,)}
    none: dict[str, dict[str, Any]] = {"cpu": {}, "ragged": {}}
    hidden = Signature("t", specs, specs, none, none, {"cpu": (1,), "ragged": (77,)}, hidden=("ragged",))
    source = changed("self.plain.same(x)", "x + 1").replace("__init__(self)", "__init__(self, n)")
    told = 'if n > 1: load_inline("of_n", f"#error {n}", no_implicit_headers=True)'
    source = source.replace("self.plain = plain", told) + "\ngeneral = True\n"
    with pytest.raises(BuildError) as failure:
        build(source, hidden)
    assert failure.value.outcome == "correctness" and "77" not in failure.value.log


def test_an_error_stays_one_if_the_module_catches_it() -> None:
    source = changed("plain = load_inline", "try:\n  plain = load_inline")
    source = source.replace("Py_NewRef(x)", "oops").replace(
        "\nclass", "\nexcept Exception:\n  plain = None\n\nclass"
    )
    error = fails(source.replace("self.plain.same(x)", "x + 1"))
    assert error.outcome == "compile" and "'oops' was not declared" in error.log


def test_a_missing_nvcc_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(nvrtc, "TOOLKIT", tmp_path)
    error = fails(changed('"plain", SOURCE,', '"plain", SOURCE, "__global__ void f() {}",'), "cuda")
    assert error.outcome == "constraints"
    assert error.log.startswith("load_inline needs nvcc for cuda_sources, and there is none on the PATH")


def test_a_missing_compiler_and_missing_headers_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("sysconfig.get_path", lambda *args, **kwargs: str(tmp_path))
        error = fails(SOURCE)
    assert error.outcome == "constraints" and "has no Python.h: install them" in error.log
    monkeypatch.setenv("PATH", str(tmp_path))
    error = fails(SOURCE)
    assert error.outcome == "constraints" and "install g++" in error.log


def test_gpu_code_is_for_the_architecture_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilers are only asked here: one that makes no objects, and a linker that makes a file."""
    commands: list[list[str]] = []

    def execute(command: list[str], folder: str, seconds: float) -> str:
        commands.append(command)
        Path(folder, command[-1]).write_bytes(b"\x7fELF")
        return ""

    monkeypatch.setattr(cpp, "_execute", execute)
    monkeypatch.setattr(extensions, "_nvcc", lambda: "/opt/cuda/bin/nvcc")

    def asked(arch: str, more: str = "") -> list[str]:
        commands.clear()
        source = changed('"plain", SOURCE,', f'"plain", SOURCE, "__global__ void f() {{}}", {more}')
        artifact = build(source, SIGNATURE, "cuda", BuildOptions("cuda", arch=arch))
        assert (artifact.lane, artifact.binaries["plain"]) == ("host", b"\x7fELF")
        assert len(commands) == 3 and commands[-1][-1] == "extension.so" and "-lcudart" in commands[-1]
        return next(command for command in commands if command[-1] == "cuda.o")

    assert "-gencode=arch=compute_90a,code=sm_90a" in asked("sm_90a")
    assert "-gencode=arch=compute_80,code=sm_80" in asked("sm_80")
    assert "-arch=sm_75" in (own := asked("sm_80", 'extra_cuda_cflags=["-arch=sm_75"],'))
    assert not any("gencode" in flag for flag in own)


def test_main_cpp_is_torchs() -> None:
    given: dict[str, Any] = {
        "cpp_sources": ["int f(int x) { return x; }"],
        "with_pytorch_error_handling": True,
    }
    assert extensions._main(given, {"f": "f"}, True) == (
        "#include <torch/extension.h>\nint f(int x) { return x; }\nPYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {\n"
        'm.def("f", torch::wrap_pybind_function(f), "f");\n}'
    )


def test_a_stand_in_knows_what_it_is_given() -> None:
    known = extensions.StandIn("plain", ["same"])
    assert hasattr(known, "same") and not hasattr(known, "other") and not hasattr(known, "__len__")
    assert hasattr(extensions.StandIn("plain"), "other")
