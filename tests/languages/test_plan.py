"""Plans for a GPU: what they hold, what they refuse."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from ke_gym.languages.artifact import Artifact
from ke_gym.languages.plan import (
    Alloc,
    Geometry,
    Launch,
    Plan,
    PlanInput,
    Ref,
    Scratch,
    TensorMap,
    TensorSpec,
    makes,
    uses,
)

SPEC = TensorSpec((64, 64), (64, 1), "float16")
GEOMETRY = Geometry((132, 1, 1), (128, 1, 1), (2, 1, 1), 49152, programmatic=True)
TILE = TensorMap(0, (64, 64), (64, 1), "float16", (32, 64), 128)


def _launch(binary: str = "b", **changes: Any) -> Launch:
    args = (Ref(0), Ref(1), TILE, 64, None, Scratch(4096))
    types = ("const half*", "half*", "CUtensorMap", "int32_t", "void*", "void*")
    return dataclasses.replace(Launch(binary, "rows", args, types, GEOMETRY, label="warps=4"), **changes)


def _plan(launch: Launch, **changes: Any) -> Plan:
    steps = (Alloc(1, SPEC), launch)
    return dataclasses.replace(
        Plan((PlanInput("input", "0", SPEC),), steps, (1,), (SPEC,), "cuda"), **changes
    )


def _artifact(plan: Plan) -> Artifact:
    return Artifact("triton", "plan", "", {"b": b"1", "c": b"2"}, {"default": plan}, arch="sm_90a")


def test_round_trip() -> None:
    plan = _plan(_launch(alternatives=(_launch("c", args=(*_launch().args[:5], Scratch(8192))),)))
    artifact = _artifact(plan)
    again = Artifact.from_bytes(artifact.to_bytes())
    assert again == artifact
    assert again.binary_id == artifact.binary_id
    assert plan.scratch_bytes == 8192
    assert uses(plan.steps[1]) == [0, 1, 0, 0, 1, 0]
    assert makes(plan.steps[0]) == (1,)


def test_choosing_among_alternatives() -> None:
    plan = _plan(_launch(alternatives=(_launch("c"),)))
    assert plan.choices == {1: 2}
    first, second = plan.choose({}), plan.choose({1: 1})
    assert [step.binary for p in (first, second) for step in p.steps if isinstance(step, Launch)] == [
        "b",
        "c",
    ]
    assert not first.choices
    assert not second.choices
    assert _artifact(first).binary_id != _artifact(second).binary_id
    assert _artifact(plan).binary_id != _artifact(first).binary_id


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": [0, 1, 1]}, "no sizes along x, y, z"),
        ({"grid": [2, 65536, 1]}, "no device takes a grid"),
        ({"grid": [3, 1, 1]}, "clusters of"),
        ({"block": [1024, 2, 1]}, "2048 threads a block"),
        ({"cluster": [32, 1, 1], "grid": [32, 1, 1]}, "blocks a cluster"),
        ({"shared": 1 << 20}, "bytes of shared memory"),
        ({"cooperative": 1}, "no device takes"),
        ({"grid": [1, 1]}, "not enough values"),
    ],
)
def test_geometries_that_no_device_takes(change: dict[str, Any], message: str) -> None:
    data = json.loads(_plan(_launch()).to_json())
    data["steps"][1]["geometry"].update(change)
    with pytest.raises(ValueError, match=message):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"box": (32, 512)}, "TMA box of"),
        ({"box": (32,)}, "TMA box of"),
        ({"stride": (64, 2)}, "last stride of 1"),
        ({"stride": (63, 1)}, "whole 16 bytes"),
        ({"swizzle": 16}, "unknown TMA swizzle"),
        ({"value": 7}, "undefined values"),
    ],
)
def test_tensor_maps_that_no_device_takes(change: dict[str, Any], message: str) -> None:
    tile = dataclasses.replace(TILE, **change)
    text = _plan(_launch(args=(*_launch().args[:2], tile, *_launch().args[3:]))).to_json()
    with pytest.raises(ValueError, match=message):
        Plan.from_json(text)


def test_geometry_belongs_to_the_gpu() -> None:
    with pytest.raises(ValueError, match="have a geometry"):
        Plan.from_json(_plan(_launch(geometry=None)).to_json())
    with pytest.raises(ValueError, match="have a geometry"):
        Plan.from_json(_plan(_launch(), device="cpu").to_json())
    with pytest.raises(ValueError, match="unknown device"):
        Plan.from_json(_plan(_launch(), device="tpu").to_json())


@pytest.mark.parametrize(("position", "value"), [(2, Ref(0)), (3, Ref(0)), (3, 1.5), (3, 1 << 40), (4, 7)])
def test_arguments_that_do_not_fit_their_type(position: int, value: Any) -> None:
    args = list(_launch().args)
    args[position] = value
    with pytest.raises(ValueError, match="cannot take"):
        Artifact.from_bytes(_artifact(_plan(_launch(args=tuple(args)))).to_bytes())


def test_alternatives_are_checked_like_the_launch() -> None:
    nested = _launch(alternatives=(_launch(alternatives=(_launch(),)),))
    with pytest.raises(ValueError, match="alternatives of another kind"):
        Plan.from_json(_plan(nested).to_json())
    with pytest.raises(ValueError, match="launches from 'd'"):
        Artifact.from_bytes(_artifact(_plan(_launch(alternatives=(_launch("d"),)))).to_bytes())
