from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from ke_gym.candidate import Candidate
from ke_gym.envs import catalog, compiling
from ke_gym.envs.compiling import Builder
from ke_gym.envs.recording import Breadth
from ke_gym.envs.table import REFERENCE, REFUSED, REPEATED, Table
from ke_gym.errors import UserError
from ke_gym.policies import make
from ke_gym.proposers.base import Context, Proposal
from ke_gym.search.budget import Budget
from ke_gym.search.observation import Surroundings
from ke_gym.search.run import run
from ke_gym.search.session import Session
from ke_gym.search.store import Setting, Store
from ke_gym.strategies import RESTART, Strategy
from ke_gym.tasks import Task
from tests.envs.recorded import Narrow, Racer, search, tables

TABLE = tables()[1]


def test_a_folder_called_like_a_split_hides_no_shipped_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TABLE.save(tmp_path / "train" / "t.npz")
    monkeypatch.chdir(tmp_path)
    assert all(path.parent == catalog.SHIPPED for path in catalog.files(("train",)))
    for own in ("./train", Path("train")):
        assert catalog.files((own,)) == [Path("train") / "t.npz"]


def test_two_tables_of_one_task_are_refused(tmp_path: Path) -> None:
    other = dataclasses.replace(TABLE, machine="another")
    with pytest.raises(UserError, match=f"different tables of {TABLE.task}"):
        catalog.load([TABLE, other])
    assert len(catalog.load([TABLE, TABLE])) == 1


def test_a_table_compressed_in_a_way_that_is_unknown_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    TABLE.save(path)
    data, central = bytearray(path.read_bytes()), b"PK\x01\x02"
    at = -1
    while (at := data.find(central, at + 1)) >= 0:
        data[at + 10 : at + 12] = (97).to_bytes(2, "little")
    path.write_bytes(data)
    with pytest.raises(UserError, match="cannot be read"):
        Table.load(path)


def same(first: Table, second: Table) -> bool:
    return first.hash == second.hash


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    for table in tables():
        table.save(tmp_path / "t.npz")
        again = Table.load(tmp_path / "t.npz")
        assert same(table, again) and again.sources == table.sources
        assert same(Builder.of(again).table(), table)


def test_what_it_says_of_itself() -> None:
    complete, wide = tables()[:2]
    assert complete.coverage()[:3] == pytest.approx([2 / 22] * 3) and complete.coverage()[-1] == 0
    # Repairs lie one edge deeper than what they repair.
    assert complete.depths.max() >= 4 and wide.depths.max() >= 3 and complete.depths.min() == 1
    assert 1 < wide.optimum < 4 and wide.median < wide.optimum
    best = wide.log_speedup[wide.champion]
    assert math.exp(best) == pytest.approx(wide.optimum)
    kinds = set(complete.edges[:, 3][complete.edges[:, 3] < 0].tolist())
    assert REPEATED in kinds and kinds <= {REFUSED, REPEATED}
    assert set(complete.edges[complete.edges[:, 0] == REFERENCE, 1].tolist()) == {RESTART.id}


def test_repeats_are_blocks_of_rounds_that_were_measured() -> None:
    ratios = np.log(TABLE.times[:, 1] / TABLE.times[:, 0])
    ends = np.cumsum(TABLE.repeats[:, 1])
    assert ends[-1] == len(TABLE.times)
    node = int(TABLE.repeats[0, 0])
    mine = np.flatnonzero(TABLE.repeats[:, 0] == node)
    medians = [np.median(ratios[ends[i] - TABLE.repeats[i, 1] : ends[i]]) for i in mine]
    np.testing.assert_allclose(TABLE.noise[mine], medians - np.mean(medians), atol=1e-6)
    assert TABLE.repeats[mine, 1].tolist() == [14, 10]


def test_a_recording_goes_on_where_it_stopped_and_a_greater_breadth_adds_to_it(tmp_path: Path) -> None:
    with Store(tmp_path / "a.db") as store:
        assert search(store, "softmax", Breadth(3, 3, 2, 1), budget=4) == "evaluations"
        assert search(store, "softmax", Breadth(3, 3, 2, 1)) == "complete"
        search(store, "softmax", Breadth(5, 3, 2, 1))
        narrow, wide = compiling.searches(store)
    with Store(tmp_path / "b.db") as store:
        search(store, "softmax", Breadth(3, 3, 2, 1))
        (whole,) = compiling.searches(store)
    assert same(compiling.build([narrow]), compiling.build([whole]))
    extended = compiling.build([compiling.build([narrow]), wide])
    assert len(extended) > len(compiling.build([narrow]))
    assert set(extended.candidates) >= set(compiling.build([wide]).candidates)
    narrow_table, wide_table = compiling.build([narrow]), compiling.build([wide])
    assert same(compiling.build([narrow_table, wide_table]), extended), (
        "tables join like the searches they hold"
    )
    assert same(compiling.build([narrow_table, narrow_table]), narrow_table)


def test_the_first_draft_is_built_upon_however_slow_it_is(tmp_path: Path) -> None:
    """An episode begins there: without it a replay would offer nothing but further drafts."""
    with Store(tmp_path / "a.db") as store:
        search(store, "softmax", Breadth(drafts=6, depth=2, width=1))
        (one,) = compiling.searches(store)
    table = compiling.build([one])
    correct = [int(node) for node in table.drafts if table.correct[node]]
    fastest = max(correct, key=lambda node: float(table.log_speedup[node]))
    extended = {int(parent) for parent in table.edges[:, 0] if parent >= 0}
    assert len(extended) == 2 and fastest in extended
    slower = (extended - {fastest}).pop()
    assert slower in correct and table.log_speedup[slower] < table.log_speedup[fastest]


def test_what_a_search_would_hold_for_its_best_is_built_upon(tmp_path: Path) -> None:
    """Below every version that was extended its fastest child, if that is faster: the way up from each of them."""
    with Store(tmp_path / "a.db") as store:
        search(store, "softmax", Breadth(drafts=6, depth=4, width=1, draws=2))
        (one,) = compiling.searches(store)
    table = compiling.build([one])
    made: dict[int, list[int]] = {}
    for parent, _, _, child in table.edges.tolist():
        if parent >= 0 and child >= 0 and table.correct[child]:
            made.setdefault(parent, []).append(child)
    extended = {int(parent) for parent in table.edges[:, 0] if parent >= 0}
    steps = 0
    for parent, children in made.items():
        best = max(children, key=lambda node: float(table.log_speedup[node]))
        if table.log_speedup[best] > table.log_speedup[parent] and table.depths[best] < 4:
            assert best in extended
            steps += 1
    assert steps > 3


def test_edges_between_recorded_versions_are_found_again() -> None:
    """A search makes nothing twice, so it records one of the ways that lead to a version."""
    whole = tables()[0]
    builder = Builder.of(whole)
    built_upon = [key for key, made in builder.children.items() if key[0] and len(made) == 2]
    for key in built_upon:
        builder.children[key].popitem()

    def again(parent: Candidate, strategy: Strategy, draw: int) -> Candidate | None:
        if draw > 1 or not Narrow().mask(parent)[strategy.id]:
            return None
        made = Narrow().propose(parent, strategy, draw, Context())
        return made.candidate if isinstance(made, Proposal) else None

    assert len(built_upon) > 20 and builder.close(again, 8) == len(built_upon)
    np.testing.assert_array_equal(builder.table().edges, whole.edges)
    assert builder.close(again, 8) == 0


def test_what_a_table_knows_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    breadth = Breadth(3, 3, 2, 1)
    with Store(tmp_path / "a.db") as store:
        search(store, "rms_norm", breadth)
        (one,) = compiling.searches(store)
    known = compiling.build([one])
    racer = Racer(Task.load("rms_norm"))
    racer.close()
    known = dataclasses.replace(known, machine=racer.facts.fingerprint)
    setting = Setting(known.task_id, known.target, known.machine, known.baseline, known.threads)
    with Store(tmp_path / "b.db") as store:
        compiling.remember(store, setting, known)
        monkeypatch.setattr(Racer, "evaluate", None)
        assert search(store, "rms_norm", breadth) == "complete"
        (again,) = compiling.searches(store)
        assert compiling.build([again]).candidates == known.candidates
        with pytest.raises(UserError, match="there is a table with threads 1, and here it is 2"):
            compiling.remember(store, dataclasses.replace(setting, threads=2), known)


def test_any_finished_search_becomes_a_table(tmp_path: Path) -> None:
    task = Task.load("softmax")
    racer = Racer(task)
    with Store(tmp_path / "s.db") as store:
        store.add_task(task)
        setting = Setting(task.id, "cpu", "m", "eager", 1)
        session = Session(
            store, "one", setting, Narrow(), budget=Budget(30), surroundings=Surroundings.of(racer)  # type: ignore[arg-type]
        )  # fmt: skip
        run(session, make("masked_random", 1), racer.evaluate, workers=2)
    racer.close()
    (table,) = compiling.from_files([tmp_path / "s.db"], (), tmp_path)
    assert set(table.candidates) == {node.candidate.id for node in session.tree}
    # The same store once more adds nothing.
    (again,) = compiling.from_files([tmp_path / "s.db"], ("softmax",), tmp_path)
    assert same(table, again)


def test_searches_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    with Store(":memory:") as store:
        search(store, "softmax", Breadth(2, 1, 1, 1))
        (one,) = compiling.searches(store)
    elsewhere = dataclasses.replace(one, identity=dataclasses.replace(one.identity, machine="other"))
    with pytest.raises(UserError, match=r"machine .* and 'other' cannot share"):
        compiling.build([one, elsewhere])
    with pytest.raises(UserError, match="there is no store"):
        compiling.from_files([tmp_path / "none.db"], (), tmp_path)
    Store(tmp_path / "empty.db").close()
    with pytest.raises(UserError, match="no search of swiglu"):
        compiling.from_files([tmp_path / "empty.db"], ("swiglu",), tmp_path)


def rewritten(path: Path, **changes: object) -> Path:
    """The file with other values in its head, or other arrays."""
    with np.load(path) as file:
        content = {name: file[name] for name in file.files}
    head = json.loads(content["head"].tobytes())
    for name, value in changes.items():
        if name in head:
            head[name] = value
        else:
            content[name] = value  # type: ignore[assignment]
    content["head"] = np.frombuffer(json.dumps(head, sort_keys=True).encode(), np.uint8)
    np.savez_compressed(path, **content)
    return path


def test_unfit_files_are_refused_by_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"

    def saved() -> Path:
        TABLE.save(path)
        return path

    with pytest.raises(UserError, match="there is no table"):
        Table.load(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no zip")
    with pytest.raises(UserError, match="cannot be read"):
        Table.load(tmp_path / "text.npz")
    half = saved().read_bytes()
    path.write_bytes(half[: len(half) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        Table.load(path)
    with pytest.raises(UserError, match="harness version 1, this is"):
        Table.load(rewritten(saved(), harness=1))
    with pytest.raises(UserError, match=r"observations of version 0.*--from"):
        Table.load(rewritten(saved(), spaces=0))
    with pytest.raises(UserError, match="format 9"):
        Table.load(rewritten(saved(), format=9))
    with pytest.raises(UserError, match="other actions"):
        Table.load(rewritten(saved(), actions=["melt"]))
    with pytest.raises(UserError, match="does not fit its hash"):
        Table.load(rewritten(saved(), log_speedup=TABLE.log_speedup + 0.1))
    with pytest.raises(UserError, match="a rival is out of range"):
        Table.load(rewritten(saved(), rivals=np.full_like(TABLE.rivals, 10_000)))
    with pytest.raises(UserError, match="edges is int32 of shape"):
        Table.load(rewritten(saved(), edges=TABLE.edges[:, :2]))
    pickled = {"head": np.array([{"a": 1}], dtype=object)}
    np.savez(path, **pickled)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="cannot be read"):
        Table.load(path)
    with pytest.raises(UserError, match="cannot be written"):
        TABLE.save("/proc/none/t.npz")


def test_tables_are_found_by_name_split_family_file_and_folder(tmp_path: Path) -> None:
    tables()[0].save(tmp_path / "a.npz")
    tables()[2].save(tmp_path / "b.npz")
    assert [table.task for table in catalog.load(tmp_path)] == ["softmax", "bias_gelu"]
    assert catalog.load([tmp_path / "a.npz", tmp_path])[0].task == "softmax"
    assert len(catalog.load([tmp_path / "a.npz", tmp_path])) == 2
    with pytest.raises(UserError, match="did you mean train"):
        catalog.load("trian")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no replay table"):
        catalog.load(tmp_path / "empty")
    shipped = catalog.load("all")
    splits = {split: catalog.load(split) for split in catalog.SPLITS if any(
        catalog.split_of(table.family) == split for table in shipped)}  # fmt: skip
    assert sum(map(len, splits.values())) == len(shipped)


def test_an_unknown_name_and_a_split_are_told_without_reading_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Table, "load", lambda path: pytest.fail(f"{path} was read"))
    with pytest.raises(UserError, match="did you mean softmax"):
        catalog.files(["sofmax"])
    named = [file for split in catalog.SPLITS for file in catalog.files([split])]
    assert sorted(named) == sorted(catalog.files(["all"]))
    assert [file.stem for file in catalog.files(["attention"])] == [
        "attention_causal", "attention_gqa_decode", "attention_vanilla"
    ]  # fmt: skip


def test_what_ships_is_sound_and_small() -> None:
    files = catalog.files(["all"])
    assert sum(file.stat().st_size for file in files) < 8 << 20
    for table in catalog.load("all"):
        assert table.task in {file.stem for file in files}
        assert table.optimum >= 1 and table.correct.any() and table.coverage()[0] > 0
