"""Which evaluator, and which language, for a target."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from ke_gym.errors import UserError
from ke_gym.evaluation.opening import language_for


@pytest.mark.parametrize(
    "text, language",
    [
        ("import triton\n", "triton"),
        ("import torch, triton, triton.language as tl\n", "triton"),
        ("def forward(x):\n    from triton import language as tl\n", "triton"),
        ("import triton.language as tl\ndef forward(x:\n", "triton"),  # the compiler will say what is wrong
        ("import torch, triton\ndef forward(x:\n", "triton"),
        ("from ke_gym import lang\nkernels = lang.cuda('import triton')\n", "cuda"),
        ("from .triton import mine\nimport tritonic\n", "cuda"),
        ("def forward(x:\n", "cuda"),
    ],
)
def test_a_gpu_s_kernels_are_in_triton_if_they_import_it(tmp_path: Path, text: str, language: str) -> None:
    path = tmp_path / "kernel.py"
    path.write_text(text)
    assert language_for("cuda:1")(path) == language
    assert language_for("cpu")(path) == "cpp"


def test_the_documented_example_is_taken_for_what_it_is(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "gpu-languages.md").read_text()
    example = text[text.index("    import torch, triton") :].split("\n\n`pip")[0]
    path = tmp_path / "example.py"
    path.write_text(textwrap.dedent("\n".join(line.split("|")[0] for line in example.splitlines())))
    compile(path.read_text(), path, "exec")
    assert language_for("cuda")(path) == "triton"


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        language_for("cuda")(tmp_path / "none.py")
