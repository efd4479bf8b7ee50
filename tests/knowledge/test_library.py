"""Folders of documents: overlays, plug-ins, learned ones, and what is wrong with some."""

from __future__ import annotations

import types
from pathlib import Path

import pytest

from ke_gym.errors import UserError
from ke_gym.knowledge import Knowledge, Situation, library
from tests.knowledge.test_documents import GOOD


def write(folder: Path, id: str, text: str = GOOD) -> None:
    path = folder / f"{id}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_folder_adds_and_replaces(tmp_path: Path) -> None:
    write(tmp_path, "guidance/softmax", GOOD.replace("Text.", "Our softmax."))
    write(tmp_path, "hardware/npu/facts", GOOD.replace("target: cpu", "target: npu").replace("cpp", "npu-c"))
    (tmp_path / "index.md").write_text("no front matter needed here")
    plain, mine = Knowledge(), Knowledge([tmp_path])
    assert len(mine) == len(plain) + 1
    assert "Our softmax." in mine.get("guidance/softmax").body
    assert mine.get("guidance/softmax").origin == str(tmp_path)
    found = mine.retrieve(Situation("npu", "npu-c", "fuse", "", "draft", "title"), 1, 1000)
    assert [d.id for d in found] == ["hardware/npu/facts"]


def test_later_folders_win(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / name, "x", GOOD.replace("Text.", f"From {name}."))
    assert "From b." in Knowledge([tmp_path / "a", tmp_path / "b"]).get("x").body
    assert "From a." in Knowledge([tmp_path / "b", tmp_path / "a"]).get("x").body


def test_folders_that_hold_no_documents_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        Knowledge([tmp_path / "absent"])
    with pytest.raises(UserError, match="holds no knowledge documents"):
        Knowledge([tmp_path])
    write(tmp_path, "bad", "no front matter")
    with pytest.raises(UserError, match=r"bad\.md"):
        Knowledge([tmp_path])
    with pytest.raises(UserError, match="no knowledge document 'guidance/nothing'"):
        Knowledge().get("guidance/nothing")


def test_installed_packages_offer_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "package", "from-package")
    write(tmp_path / "function", "from-function")
    package = types.ModuleType("npu_docs")
    package.__path__ = [str(tmp_path / "package")]
    offered = {"p": package, "f": lambda: tmp_path / "function"}

    class Point:
        def __init__(self, name: str) -> None:
            self.name, self.value = name, name

        def load(self) -> object:
            return offered[self.name]

    monkeypatch.setattr(library, "entry_points", lambda group: [Point(name) for name in offered])
    knowledge = Knowledge()
    assert knowledge.get("from-package") and knowledge.get("from-function")
    offered["wrong"] = "text"  # type: ignore[assignment]
    with pytest.raises(UserError, match="neither a package nor a function"):
        Knowledge()


def test_learned_documents_are_told_apart(tmp_path: Path) -> None:
    write(tmp_path, "cpu-fuse", GOOD.replace("Text.", "fuse: 1.4x on norms."))
    knowledge = Knowledge(learned=tmp_path)
    assert knowledge.get("learned/cpu-fuse").learned
    assert not knowledge.get("guidance/softmax").learned
    assert len(Knowledge(learned=tmp_path / "absent")) == len(knowledge) - 1
