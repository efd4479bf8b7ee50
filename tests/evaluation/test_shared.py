from __future__ import annotations

import os
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ke_gym.evaluation.shared import ALIGNMENT, POISON, RED_ZONE, Layout, SharedBuffer, damaged, poison, zones
from ke_gym.languages.plan import TensorSpec


@st.composite
def specs(draw: st.DrawFn) -> TensorSpec:
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    order = draw(st.permutations(range(len(shape))))
    stride, step = [0] * len(shape), draw(st.integers(1, 2))
    for axis in order:
        stride[axis] = step
        step *= max(shape[axis], 1)
    return TensorSpec(
        shape, tuple(stride), draw(st.sampled_from(["float32", "float64", "int8", "bool", "bfloat16"]))
    )


@settings(max_examples=50, deadline=None)
@given(
    st.lists(specs(), max_size=5), st.dictionaries(st.text(), specs(), max_size=3), st.none() | st.integers()
)
def test_layouts_keep_tensors_apart(
    inputs: list[TensorSpec], state: dict[str, TensorSpec], seed: int | None
) -> None:
    layout = Layout.plan(inputs, state, None if seed is None else random.Random(seed))
    end = 0
    for offset, length in layout.used:
        assert offset % ALIGNMENT == 0 and offset - end >= RED_ZONE
        end = offset + length
    assert layout.bytes - end >= RED_ZONE
    assert Layout.from_dict(layout.to_dict()) == layout
    with SharedBuffer(layout.bytes) as buffer:
        views, named = layout.split(buffer)
        assert [TensorSpec.of(v) for v in views] == inputs
        assert {name: TensorSpec.of(v) for name, v in named.items()} == state


def test_what_is_written_through_one_mapping_is_seen_through_another() -> None:
    spec = TensorSpec((3, 4), (4, 1), "float32")
    layout = Layout.plan([spec])
    with SharedBuffer(layout.bytes) as buffer:
        with SharedBuffer.from_fd(buffer.read_only_fd(), layout.bytes, writable=False) as reader:
            layout.views(buffer)[0].copy_(torch.arange(12.0).view(3, 4))
            assert torch.equal(layout.views(reader)[0], torch.arange(12.0).view(3, 4))
        with pytest.raises(PermissionError):
            os.ftruncate(buffer.fd, 0)
        with pytest.raises(ValueError, match="does not fit"):
            buffer.tensor(spec, layout.bytes - 8)


def test_a_read_only_descriptor_cannot_be_mapped_for_writing() -> None:
    with SharedBuffer(64) as buffer, pytest.raises(PermissionError):
        SharedBuffer.from_fd(buffer.read_only_fd(), 64, writable=True)


@given(st.integers(0, 1), st.data())
def test_every_stray_byte_is_found(pattern: int, data: st.DataObject) -> None:
    memory = torch.zeros(2000, dtype=torch.uint8)
    used = [(256, 300), (900, 64)]
    poison(memory, used, pattern)
    assert damaged(memory, used) is None
    assert bool((memory[256:556] == POISON[pattern]).all())
    memory[256:556] = 7  # inside: allowed
    assert damaged(memory, used) is None
    stray = data.draw(st.sampled_from([b for start, end in zones(used, 2000) for b in range(start, end)]))
    memory[stray] = 0
    assert damaged(memory, used) == stray
