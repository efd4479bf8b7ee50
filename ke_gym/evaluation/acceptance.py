"""When is an output right? Error ratios against an fp64 oracle.

An output is accepted when its error is at most ``RATIO`` times that of the trusted reference at the same
dtype, or below a floor that an honest implementation of that dtype can meet and a strictly lower-precision
one can not, by three measures at once (largest error, relative L2, a tail quantile), and never above a hard
cap. Integers follow the same rule by counting mismatches. Non-finite values must match by position: there is
no NaN wildcard. Source: research notes on evaluation, section 2.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

RATIO = 2.0
TAIL = 0.999

# Relative-L2 floor of an honest implementation per dtype: below what the next lower precision can reach
# (a bf16 computation of an fp32 task errs by ~1e-3, tf32 by ~3e-4, fp16 by ~3e-4).
FLOOR = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
POLICY_FLOOR = {"strict": 0.0, "tf32": 1e-3, "bf16": 1e-2}
HARD_CAP = 0.05


@dataclass(frozen=True)
class Errors:
    """Errors of one output against the oracle.

    max_abs: largest absolute error, in the output's unit; max_rel: the same over the largest |oracle|;
    rel_l2: L2 norm of the error over that of the oracle; tail: the 99.9 % quantile of
    |error| / (|oracle| + rms(oracle)).
    """

    max_abs: float
    max_rel: float
    rel_l2: float
    tail: float


@dataclass(frozen=True)
class Verdict:
    """Whether one output is accepted, the numbers, and where it is wrong."""

    ok: bool
    reason: str
    max_abs: float = 0.0
    rel_l2: float = 0.0
    ratio: float = 0.0
    pattern: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def floor(dtype: torch.dtype, precision: str, tolerance: float | None, reduction_length: float) -> float:
    """The relative-L2 error below which an output is accepted whatever the reference's own error is.

    Rounding of an honest sum of K terms grows at worst like K**0.5; K**0.25 leaves room for a plain blocked
    accumulation yet none for rounding the inputs to half precision.
    """
    base = FLOOR[dtype] * max(1.0, reduction_length) ** (0.25 if dtype.itemsize >= 4 else 0.0)
    return max(base, POLICY_FLOOR[precision] if dtype.itemsize >= 4 else 0.0, tolerance or 0.0)


def errors(output: Tensor, oracle: Tensor, mask: Tensor | None = None) -> Errors:
    """Errors of ``output`` against the fp64 ``oracle`` (same shape), over the positions in ``mask``."""
    y = oracle.reshape(-1)
    d = (output.reshape(-1).double() - y).abs_()
    if mask is not None:
        y, d = y[mask.reshape(-1)], d[mask.reshape(-1)]
    if y.numel() == 0:
        return Errors(0.0, 0.0, 0.0, 0.0)
    magnitude = y.abs()
    tiny = 1e-300
    rms = float(torch.linalg.vector_norm(y)) / math.sqrt(y.numel())
    top = float(magnitude.max())
    max_abs = float(d.max())
    l2 = float(torch.linalg.vector_norm(d))
    relative = d / (magnitude + (rms + tiny))
    k = max(1, math.ceil(TAIL * relative.numel()))
    tail = float(relative.kthvalue(k).values) if relative.numel() <= 1 << 16 else _quantile(relative)
    return Errors(max_abs, max_abs / (top + tiny), l2 / (rms * math.sqrt(y.numel()) + tiny), tail)


def _quantile(values: Tensor) -> float:
    """The ``TAIL`` quantile, from a fixed-stride sample: a full sort would cost more than the kernel."""
    sample = values[:: max(1, values.numel() >> 16)]
    return float(sample.kthvalue(max(1, math.ceil(TAIL * sample.numel()))).values)


def judge_output(
    output: Tensor,
    reference: Tensor,
    oracle: Tensor,
    *,
    precision: str = "strict",
    tolerance: float | None = None,
    reduction_length: float = 1.0,
) -> Verdict:
    """Accept or reject one output.

    Args:
        output: the candidate's tensor.
        reference: the trusted eager result at the same dtype.
        oracle: the fp64 result (or, for integer outputs, the fp64 computation's integers).
        precision: the task's precision policy.
        tolerance: the task's relative tolerance, if it states one.
        reduction_length: about how many input elements one output element depends on.
    """
    if output.shape != reference.shape or output.dtype != reference.dtype:
        return Verdict(
            False,
            f"output is {tuple(output.shape)} {output.dtype}, expected {tuple(reference.shape)} {reference.dtype}",
        )
    if not reference.is_floating_point():
        return _judge_integers(output, reference, oracle)
    if output.numel() == 0:
        return Verdict(True, "")
    rounded = oracle.to(reference.dtype)
    if not _same_nonfinite(output, reference, rounded):
        wrong = (~torch.isfinite(output)) & torch.isfinite(reference)
        if not bool(wrong.any()):
            wrong = torch.isfinite(output) & ~torch.isfinite(reference)
        count = int(wrong.sum())
        kind = "non-finite where the reference is finite" if bool((~torch.isfinite(output))[wrong].any()) else (
            "finite where the reference is not"
        )
        return Verdict(False, f"{count} values {kind}", math.inf, math.inf, math.inf, error_pattern(wrong))
    mask = torch.isfinite(reference) & torch.isfinite(rounded) & torch.isfinite(output)
    full = bool(mask.all())
    got = errors(output, oracle, None if full else mask)
    base = errors(reference, oracle, None if full else mask)
    least = floor(reference.dtype, precision, tolerance, reduction_length)
    limits = {
        "relative L2": (got.rel_l2, max(RATIO * base.rel_l2, least)),
        "largest error": (got.max_rel, max(RATIO * base.max_rel, 4 * least)),
        "tail error": (got.tail, max(RATIO * base.tail, 4 * least)),
    }
    ratio = max(
        value / max(own, least / RATIO)
        for value, own in ((got.rel_l2, base.rel_l2), (got.max_rel, base.max_rel), (got.tail, base.tail))
    )
    cap = max(HARD_CAP, 2 * least)
    for name, (value, limit) in limits.items():
        if not value <= limit or (name == "relative L2" and value > cap and value > base.rel_l2):
            wrong = (output.double() - oracle).abs() > limit * (oracle.abs() + float(oracle[mask].abs().max()))
            if name == "relative L2" or not bool(wrong.any()):
                rms = float(torch.linalg.vector_norm(oracle[mask])) / math.sqrt(int(mask.sum()))
                wrong = (output.double() - oracle).abs() > limit * (oracle.abs() + rms)
            reason = f"{name} {value:.2g}, the reference itself has {base.rel_l2:.2g} relative L2"
            return Verdict(False, reason, got.max_abs, got.rel_l2, ratio, error_pattern(wrong & mask))
    return Verdict(True, "", got.max_abs, got.rel_l2, ratio)


def _judge_integers(output: Tensor, reference: Tensor, oracle: Tensor) -> Verdict:
    """Integers are exact, except where rounding already makes the reference disagree with the oracle."""
    exact = oracle.to(reference.dtype)
    ambiguous = reference != exact
    wrong = (output != exact) & ((output != reference) | ~ambiguous)
    count = int(wrong.sum())
    allowed = int(RATIO * int(ambiguous.sum()))
    if count <= allowed:
        return Verdict(True, "", float(count), 0.0, 0.0)
    share = count / max(1, output.numel())
    return Verdict(False, f"{count} integers differ", float(count), share, math.inf, error_pattern(wrong))


def _same_nonfinite(output: Tensor, reference: Tensor, oracle: Tensor) -> bool:
    def matches(a: Tensor, b: Tensor) -> Tensor:
        return (torch.isnan(a) & torch.isnan(b)) | (a == b) | (torch.isfinite(a) & torch.isfinite(b))

    return bool((matches(output, reference) | matches(output, oracle)).all())


def error_pattern(wrong: Tensor) -> str:
    """In words, which elements are wrong: what a person would look for first.

    ``wrong`` is a boolean mask of the output's shape.
    """
    total = wrong.numel()
    count = int(wrong.sum())
    if count == 0:
        return "errors spread thinly over all elements"
    if count == total:
        return "every element"
    words = []
    for axis, size in enumerate(wrong.shape):
        if size < 2:
            continue
        others = [a for a in range(wrong.dim()) if a != axis]
        hit = wrong.any(dim=others) if others else wrong
        places = torch.nonzero(hit).flatten().tolist()
        if len(places) == size:
            continue
        first, last = places[0], places[-1]
        if len(places) == 1:
            words.append(f"index {first} of dimension {axis}")
        elif last == size - 1 and len(places) == last - first + 1:
            tile = next((t for t in (1024, 512, 256, 128, 64, 32, 16, 8) if first == size - size % t), None)
            tail = f"last partial tile (of {tile})" if tile and size % tile else f"indices {first}…{last}"
            words.append(f"{tail} of dimension {axis}")
        elif len(places) == last - first + 1:
            words.append(f"indices {first}…{last} of dimension {axis}")
        else:
            step = places[1] - places[0]
            if all(b - a == step for a, b in zip(places, places[1:])):
                words.append(f"one index in {step} from {first} of dimension {axis}")
    share = f"{count} of {total} elements ({100 * count / total:.2g} %)"
    return share + (": " + ", ".join(words) if words else ": scattered")
