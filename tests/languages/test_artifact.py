from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ke_gym.languages.artifact import Artifact
from ke_gym.languages.plan import DTYPES, Alloc, Call, Launch, Plan, PlanInput, Ref, TensorSpec, strict_json

SPEC = TensorSpec((2, 3), (3, 1), "float32")


def _artifact(
    constant: torch.Tensor | None = None, binary: bytes = b"\x7fELF", name: str = "cpp_1", **changes: Any
) -> Artifact:
    constant = torch.arange(6.0).reshape(2, 3) if constant is None else constant
    plan = Plan(
        (PlanInput("input", "0", SPEC), PlanInput("constant", "c", TensorSpec.of(constant))),
        (
            Alloc(2, SPEC),
            Launch(
                name,
                "f",
                (Ref(0), Ref(2), 6, 0.5, True),
                ("const float*", "float*", "int64_t", "float", "bool"),
            ),
            Call("aten.sum.dim_IntList", (Ref(2), (0, 1)), {"dtype": torch.float32}, (3,)),
        ),
        (3,),
        (TensorSpec((), (), "float32"),),
    )
    whole = Artifact(
        "cpp", "plan", "x", {name: binary}, {"default": plan}, {"c": constant}, {"warnings": ["w"]}, True
    )
    return dataclasses.replace(whole, **changes)


def test_round_trip() -> None:
    artifact = _artifact()
    again = Artifact.from_bytes(artifact.to_bytes())
    assert torch.equal(again.constants["c"], artifact.constants["c"])
    assert dataclasses.replace(again, constants={}) == dataclasses.replace(artifact, constants={})
    assert again.binary_id == artifact.binary_id


@given(
    st.sampled_from(sorted(DTYPES)),
    st.lists(st.integers(0, 4), max_size=3),
    st.integers(0, 2),
    st.randoms(use_true_random=False),
)
def test_constants_keep_dtype_shape_stride_and_bits(
    dtype: str, shape: list[int], padding: int, order: Any
) -> None:
    axes = list(range(len(shape)))
    order.shuffle(axes)
    raw = torch.randint(0, 2, [n + padding for n in shape]).to(DTYPES[dtype])
    tensor = raw[tuple(slice(n) for n in shape)].permute(axes)
    again = Artifact.from_bytes(_artifact(tensor).to_bytes()).constants["c"]
    assert TensorSpec.of(again) == TensorSpec.of(tensor)
    assert torch.equal(again, tensor)


def test_overlapping_constants_stay_small() -> None:
    tensor = torch.ones(1).expand(1000, 1000)
    data = _artifact(tensor).to_bytes()
    assert len(data) < 4000
    assert Artifact.from_bytes(data).constants["c"].stride() == (0, 0)


def test_binary_id_ignores_names_and_sources() -> None:
    artifact = _artifact()
    assert _artifact(name="cpp_2", source="y", report={}).binary_id == artifact.binary_id
    assert _artifact(binary=b"other").binary_id != artifact.binary_id
    assert _artifact(torch.zeros(2, 3)).binary_id != artifact.binary_id
    host = Artifact("cpp", "host", "x", {"cpp_1": b"\x7fELF"})
    assert host.binary_id != dataclasses.replace(host, source="y").binary_id


def _edited(**changes: Any) -> bytes:
    data = _artifact().to_bytes()
    length = int.from_bytes(data[6:14], "little")
    header = json.loads(data[14 : 14 + length])
    header.update(changes)
    text = json.dumps(header).encode()
    return data[:6] + len(text).to_bytes(8, "little") + text + data[14 + length :]


def _step(**changes: Any) -> dict[str, str]:
    plan = json.loads(_artifact().plans["default"].to_json())
    step = next(s for s in plan["steps"] if s["op"] == changes.get("op", "launch"))
    step.update(changes)
    return {"default": json.dumps(plan)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 3}, "version"),
        ({"lane": "other"}, "lane"),
        ({"general": 1}, "lane"),
        ({"binaries": [["cpp_1", 5]]}, "blobs"),
        ({"binaries": [["cpp_1", -4]]}, "blobs"),
        ({"binaries": [["cpp_2", 4]]}, "launches from 'cpp_1'"),
        ({"binaries": [[1, 4]]}, "no text"),
        ({"constants": [["c", [2, 3], [3, 1], "float32", 24]], "plans": {"default": "{"}}, "Expecting"),
        ({"constants": [["d", [2, 3], [3, 1], "float32", 24]]}, "constant 'c'"),
        ({"constants": [["c", [2, 3], [3, 2], "float32", 24]]}, "wrong size"),
        ({"constants": [["c", [2, 3], [3, 1], "float99", 24]]}, "no tensor"),
        ({"constants": [["c", [2**40, 2**40], [0, 0], "float32", 24]]}, "wrong size"),
        ({"plans": _step(args=[{"ref": 0}, {"ref": 2}, 6, 0.5])}, "4 arguments, 5 types"),
        ({"plans": _step(args=[{"ref": 0}, {"ref": 9}, 6, 0.5, True])}, "undefined values"),
        ({"plans": _step(args=[{"ref": 0}, {"ref": 2}, 2**63, 0.5, True])}, "cannot take"),
        ({"plans": _step(args=[{"ref": 0}, {"ref": 2}, {"ref": 1}, 0.5, True])}, "cannot take"),
        ({"plans": _step(args=[{"ref": 0}, 4096, 6, 0.5, True])}, "cannot take"),
        ({"plans": _step(op="call", target="aten.from_file.default")}, "not allowed"),
        ({"plans": _step(op="call", target="aten.nothing.default")}, "does not exist"),
        ({"plans": _step(op="call", target="os.system.default")}, "outside the namespaces"),
        ({"plans": 3}, "not an artifact"),
        ({"report": []}, "report"),
        ({"source": None}, "no text"),
        ({"source": "half a \ud83d"}, "surrogates"),
        ({"report": {"warnings": ["half a \ud83d"]}}, "surrogates"),
        ({"plans": _step(kernel="half_a_\ud83d")}, "surrogates"),
        ({"report": {"seconds": math.inf}}, "no number"),
    ],
)
def test_what_is_odd_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Artifact.from_bytes(_edited(**changes))


@pytest.mark.parametrize("text", ["1e999", "-1e999", "NaN", "Infinity", '{"a": [1, -Infinity]}', '"\\ud800"'])
def test_what_could_not_be_written_again_is_not_read(text: str) -> None:
    with pytest.raises(ValueError):
        strict_json(text)
    assert strict_json('["\\ud83d\\ude00", 1e300, -3]') == ["\U0001f600", 1e300, -3]


@settings(max_examples=300)
@given(st.data())
def test_damaged_bytes_never_do_more_than_raise_value_error(data: st.DataObject) -> None:
    whole = bytearray(_artifact().to_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    damaged = (
        bytes(whole[: data.draw(st.integers(0, len(whole)))]) if data.draw(st.booleans()) else bytes(whole)
    )
    try:
        artifact = Artifact.from_bytes(damaged)
    except ValueError:
        return
    assert isinstance(artifact.to_bytes(), bytes)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["ref", "dtype", "a"]), inner, max_size=2)
    ),
    max_leaves=8,
)


@settings(max_examples=300)
@given(
    st.sampled_from(["binaries", "plans", "constants", "lane", "language", "general", "report", "version"]),
    JSON,
)
def test_any_header_never_does_more_than_raise_value_error(key: str, value: Any) -> None:
    try:
        artifact = Artifact.from_bytes(_edited(**{key: value}))
    except ValueError:
        return
    assert isinstance(artifact, Artifact)


@settings(max_examples=200)
@given(
    st.sampled_from(["args", "kwargs", "outs", "target", "spec", "ctypes", "kernel"]),
    JSON,
    st.sampled_from(["call", "launch", "alloc"]),
)
def test_any_step_never_does_more_than_raise_value_error(key: str, value: Any, op: str) -> None:
    try:
        artifact = Artifact.from_bytes(_edited(plans=_step(**{key: value}, op=op)))
    except ValueError:
        return
    assert Artifact.from_bytes(artifact.to_bytes()).plans == artifact.plans
