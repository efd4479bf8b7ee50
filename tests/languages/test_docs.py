from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from ke_gym.languages.module import load


def test_the_worked_example_computes_softmax(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    text = (Path(__file__).parents[2] / "docs" / "kernel-modules.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    x = torch.randn(7, 33)
    torch.testing.assert_close(load(example).forward(x), x.softmax(-1))
