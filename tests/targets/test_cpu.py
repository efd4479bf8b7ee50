from __future__ import annotations

import pytest
import torch

from ke_gym.targets.cpu import Peaks

PEAKS = Peaks(2, ((1 << 18, 1e11), (1 << 29, 1e10)), fp32=1e11, fp64=5e10)


@pytest.mark.parametrize(
    ("dtype", "precision", "matrix_unit", "loose"),
    [
        (torch.float32, "strict", False, False),
        (torch.float64, "strict", False, False),
        (torch.float32, "strict", True, True),
        (torch.float32, "bf16", False, True),
        (torch.bfloat16, "strict", False, True),
        (torch.float16, "strict", False, True),
    ],
)
def test_what_may_be_multiplied_as_bf16_is_not_bounded_by_fp32(
    dtype: torch.dtype, precision: str, matrix_unit: bool, loose: bool
) -> None:
    bounded = PEAKS.bounded_by({dtype, torch.int64}, precision, matrix_unit)
    plain = PEAKS.floor_s(0, 1e9)
    assert (bounded.floor_s(0, 1e9) < plain / 2) == loose
    assert (bounded.floor_s(0, 1e9) == plain) == (not loose)
    assert bounded.floor_s(1e9, 0) == PEAKS.floor_s(1e9, 0)
    assert Peaks.from_json(PEAKS.to_json()) == PEAKS
