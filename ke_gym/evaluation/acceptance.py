"""When is an output right? Error ratios against an fp64 oracle.

An output is accepted when its error is at most ``RATIO`` times that of the trusted reference at the same
dtype, or below a floor that an honest implementation of that dtype can meet and a strictly lower-precision
one can not, by three measures at once (largest error, relative L2, a tail quantile), and never above a hard
cap. Integers follow the same rule by counting mismatches. Non-finite values must match by position: there is
no NaN wildcard. (ARCHITECTURE.md, "How a verdict is reached".)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

RATIO = 2.0
DEGENERATE = 8.0
"""On inputs that are all equal the reference's own error is a few roundings, which a norm may amplify a thousandfold: in
1,500 batch norms of 24 equal rows plain sums erred by up to 12 times as much, half precision by hundreds to thousands."""
NOTHING_BUT = 1000.0
"""An output is nothing but rounding if the reference's error is larger than the truth by this: of zero, an fp64 oracle's own
rounding is what is left."""
AMPLIFIED = 316.0
"""What a norm (eps 1e-5) of equal values makes of a rounding error; the reference's own may be none there, by luck."""
TAIL = 0.999
CLOSE = 64.0
"""A refusal is a close call up to this many times a limit: sums that nearly cancel can be off by so much more than the
reference happens to be, a lower precision is by far more."""
FEW = 1 << 20
"""More elements than that leave nothing to chance."""
DRAWINGS = 16
"""How many contents decide a close call: of as many elements, equal ones differ twofold once in 240 times (an F quantile)."""

# Relative-L2 floor of an honest implementation per dtype: below what the next lower precision can reach
# (a bf16 computation of an fp32 task errs by ~1e-3, tf32 by ~3e-4, fp16 by ~3e-4).
FLOOR = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
POLICY_FLOOR = {"strict": 0.0, "tf32": 1e-3, "bf16": 1e-2}
HARD_CAP = 0.05
BLOCK = 128
MEASURES = (
    ("rel_l2", "relative L2", 1),
    ("max_rel", "largest", 4),
    ("tail", "tail", 4),
    ("typical", "typical", 2),
)
"""The field of ``Errors``, its name for people, and by how much its floor is above the relative-L2 floor."""


@dataclass(frozen=True)
class Errors:
    """Errors of one output against the oracle.

    max_abs, rms: largest absolute error and root mean square, in the output's unit; max_rel: over the largest |oracle|;
    rel_l2: L2 norm of the error over that of the oracle; tail: the 99.9 % quantile of
    |error| / (|oracle| + rms(oracle)); typical: the median of |error| / |oracle|, which a few huge values
    (a mask's -1e4) can't hide.
    """

    max_abs: float
    rms: float
    max_rel: float
    rel_l2: float
    tail: float
    typical: float


@dataclass(frozen=True)
class Verdict:
    """Whether one output is accepted, the numbers, and where it is wrong; ``close``: other contents may show otherwise."""

    ok: bool
    reason: str
    max_abs: float = 0.0
    rel_l2: float = 0.0
    ratio: float = 0.0
    pattern: str = ""
    close: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def floor(dtype: torch.dtype, precision: str, tolerance: float | None, reduction_length: float) -> float:
    """The relative-L2 error below which an output is accepted whatever the reference's own error is.

    Rounding of an honest sum of K terms grows at worst like K**0.5; K**0.25, up to 8, leaves room for a
    plain blocked accumulation yet none for rounding the inputs to half precision.
    """
    base = FLOOR[dtype] * (min(8.0, max(1.0, reduction_length) ** 0.25) if dtype.itemsize >= 4 else 1.0)
    return max(base, POLICY_FLOOR[precision] if dtype.itemsize >= 4 else 0.0, tolerance or 0.0)


Size = tuple[float, float]
"""How large an output is (root mean square), and its ``Expected.rounding``."""
UNSEEN: Size = (0.0, 0.0)


@dataclass
class Expected:
    """The trusted side of one output, prepared once and compared with many candidates.

    reference: the eager result at the task's dtype; oracle: the fp64 result (or, for integer outputs, the
    fp64 computation's integers); reduction_length: about how many inputs one output element depends on.
    scale: on degenerate inputs, what errors are measured against where the oracle is smaller; 0 on others.
    noise: the reference's own error (root mean square) on the task's inputs, if the output is nothing but rounding there.
    Complex numbers are kept as pairs of real ones.

    Of some outputs the truth is zero whatever the inputs are (the gradient of a bias before a batch norm), and what is computed
    is nothing but rounding: its errors are measured against the reference's, as on degenerate inputs.
    """

    reference: Tensor
    oracle: Tensor
    precision: str = "strict"
    tolerance: float | None = None
    reduction_length: float = 1.0
    scale: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        self.dtype = self.reference.dtype
        self.reference, self.oracle = as_real(self.reference), as_real(self.oracle)
        self.floating = self.reference.is_floating_point()
        self.mask: Tensor | None = None
        self.rounding = 0.0
        """How large the values are, if they are nothing but rounding (root mean square)."""
        if not self.floating or self.reference.numel() == 0:
            return
        self.truth, top = self.oracle.double(), _largest(self.oracle)
        self.count = self.oracle.numel()
        if not (math.isfinite(_largest(self.reference)) and top <= torch.finfo(self.reference.dtype).max):
            finite = torch.isfinite(self.reference) & torch.isfinite(self.oracle.to(self.reference.dtype))
            self.count = int(finite.sum())
            if self.count < finite.numel():
                self.mask = finite
                self.truth = self.truth.where(finite, 0.0)
                top = _largest(self.truth)
        self.unit = self.scale
        """What errors are measured against where the oracle is smaller."""
        size = float(torch.linalg.vector_norm(self.truth)) / math.sqrt(max(1, self.count))
        self.rms = max(size, self.unit)
        self.top = max(top, self.unit)
        self.least = floor(self.reference.dtype, self.precision, self.tolerance, self.reduction_length)
        self.base = self.errors(self.reference)
        own = self.base.rms if self.base.rms > NOTHING_BUT * self.rms else 0.0
        self.rounding = max(own, self.noise if size < self.noise else 0.0)
        if self.rounding:
            self.unit = max(self.unit, self.rounding)
            self.rms, self.top = max(self.rms, self.unit), max(self.top, self.unit)
            self.base = self.errors(self.reference)

    @property
    def size(self) -> Size:
        """Its root mean square, and ``rounding``."""
        return (self.rms, self.rounding) if self.floating and self.reference.numel() else (0.0, 0.0)

    @property
    def slack(self) -> float:
        """How many times the reference's error is right."""
        if not self.unit:
            return RATIO
        # Longer sums round more, and so does a precision that the policy permits.
        return RATIO * DEGENERATE * self.least / FLOOR[self.reference.dtype]

    def own(self, measure: str) -> float:
        """The reference's error."""
        return max(float(getattr(self.base, measure)), self.rounding and self.rounding / self.rms)

    def errors(self, output: Tensor) -> Errors:
        """Errors of ``output`` over the positions where both trusted results are finite."""
        if not self.count:
            return Errors(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        y = self.truth.reshape(-1)
        x = output.reshape(-1)
        d = (x if x.is_cuda else x.double()) - y  # a GPU widens what it reads at no cost
        if self.mask is not None:
            d = d.where(self.mask.reshape(-1), 0.0)
        tiny = 1e-300
        max_abs = _largest(d)
        rms = float(torch.linalg.vector_norm(d)) / math.sqrt(self.count)
        # Quantiles of a sample: a sort would cost more than the kernel. It is one of what is finite, wherever that lies.
        stride = slice(None, None, max(1, self.count >> 16))
        places = stride if self.mask is None else self.mask.reshape(-1).nonzero()[:, 0][stride]
        some, magnitude = d[places].abs(), y[places].abs()
        tail = _quantile(some / (magnitude + (self.rms + tiny)), TAIL)
        typical = _quantile(some / (magnitude + (self.unit + tiny)), 0.5)
        return Errors(max_abs, rms, max_abs / (self.top + tiny), rms / (self.rms + tiny), tail, typical)


def largest(sizes: Sequence[Size], others: Sequence[Size]) -> list[Size]:
    """Of two drawings' outputs the larger sizes, one by one."""
    return [(max(a, c), max(b, d)) for (a, b), (c, d) in zip(sizes, others, strict=True)]


def as_real(values: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones, shape (…, 2); anything else as it is."""
    return torch.view_as_real(values.resolve_conj()) if values.is_complex() else values


def _largest(values: Tensor) -> float:
    """The largest magnitude, in one pass; NaN if there is any."""
    low, high = values.aminmax()
    return float(torch.maximum(-low, high))


def _quantile(values: Tensor, q: float) -> float:
    place = max(1, math.ceil(q * values.numel()))
    if values.is_cuda:  # where a selection is the work of a single block
        return float(values.sort().values[place - 1])
    return float(values.kthvalue(place).values)


def judge_output(output: Tensor, expected: Expected) -> Verdict:
    """Accept or reject one output."""
    dtype, output = output.dtype, as_real(output)
    reference, oracle = expected.reference, expected.oracle
    if output.shape != reference.shape or dtype != expected.dtype:
        return Verdict(
            False,
            f"output is {tuple(output.shape)} {dtype}, expected {tuple(reference.shape)} {expected.dtype}",
        )
    if not expected.floating:
        return _judge_integers(output, reference, oracle)
    if output.numel() == 0:
        return Verdict(True, "")
    got = expected.errors(output)
    if expected.mask is not None or not math.isfinite(got.max_abs):
        misplaced = _misplaced_nonfinite(output, expected)
        if misplaced is not None:
            return misplaced
    own_l2, least = expected.own("rel_l2"), expected.least
    cap = math.inf if expected.rounding else max(HARD_CAP, 2 * least, 1.1 * own_l2)
    measured = [
        (
            name,
            getattr(got, field),
            expected.own(field),
            factor * (AMPLIFIED * least if expected.scale else least),
        )
        for field, name, factor in MEASURES
    ]
    ratio = max(value / max(own, bound / RATIO) for _, value, own, bound in measured)
    limits = [max(expected.slack * own, bound) for _, _, own, bound in measured]
    close = expected.count <= FEW and all(m[1] <= CLOSE * limit for m, limit in zip(measured, limits))
    limits[0] = min(limits[0], cap)
    for (name, value, own, _), limit in zip(measured, limits):
        if value <= limit:
            continue
        scale = expected.top if name == "largest" else expected.rms
        wrong = ~((output.double() - oracle).abs() <= limit * (oracle.abs() + scale))
        if expected.mask is not None:
            wrong &= expected.mask
        reason = f"{name} error {value:.2g}, where the reference itself has {own:.2g}"
        return Verdict(False, reason, got.max_abs, got.rel_l2, ratio, error_pattern(wrong), close)
    return Verdict(True, "", got.max_abs, got.rel_l2, ratio)


class Pool:
    """The outputs of a close call, and what other contents give for them: each is judged as if all were one output."""

    def __init__(self) -> None:
        self.drawn: dict[int, list[tuple[Tensor, Expected]]] = {}
        """By output: what was computed, and what is expected of it."""

    def add(self, outputs: Sequence[Tensor], expected: Iterable[Expected]) -> None:
        """What other contents gave."""
        for index, each in enumerate(expected):
            if index in self.drawn:
                self.drawn[index].append((outputs[index].clone(), each))

    def verdict(self) -> Verdict:
        """The worst output's."""
        return worst(self._together(pairs) for pairs in self.drawn.values())

    def _together(self, pairs: list[tuple[Tensor, Expected]]) -> Verdict:
        one = pairs[0][1]
        whole = Expected(
            torch.stack([each.reference for _, each in pairs]), torch.stack([each.oracle for _, each in pairs]),
            one.precision, one.tolerance, one.reduction_length, one.scale, one.noise,
        )  # fmt: skip
        verdict = judge_output(torch.stack([as_real(output) for output, _ in pairs]), whole)
        # Where it is wrong would name drawings as if they were rows.
        return replace(
            verdict, reason=f"{verdict.reason} (over {len(pairs)} drawings)", pattern="", close=False
        )


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The first refusal, or else the one with the largest ratio."""
    top = Verdict(True, "")
    for verdict in verdicts:
        if not verdict.ok:
            return verdict
        top = verdict if verdict.ratio >= top.ratio else top
    return top


def compare(outputs: Sequence[Tensor], expected: Iterable[Expected]) -> tuple[Verdict, Pool | None]:
    """The worst output's verdict; if it is a close call, the pool of what was refused."""
    verdicts, pool = [], Pool()
    for index, each in enumerate(expected):
        verdict = judge_output(outputs[index], each)
        verdicts.append(verdict)
        if not verdict.ok:
            if not verdict.close:
                return verdict, None
            pool.drawn[index] = [(outputs[index].clone(), each)]
    return worst(verdicts), pool if pool.drawn else None


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


def _misplaced_nonfinite(output: Tensor, expected: Expected) -> Verdict | None:
    """NaN and infinities match by position, with the reference or with the oracle at the same dtype."""

    def matches(b: Tensor) -> Tensor:
        both_nan, both_finite = (
            torch.isnan(output) & torch.isnan(b),
            torch.isfinite(output) & torch.isfinite(b),
        )
        return both_nan | both_finite | (output == b)

    wrong = ~(matches(expected.reference) | matches(expected.oracle.to(output.dtype)))
    if not bool(wrong.any()):
        return None
    invented = bool((~torch.isfinite(output) & torch.isfinite(expected.reference) & wrong).any())
    kind = (
        "non-finite where the reference is finite" if invented else "not the NaN or infinity of the reference"
    )
    reason = f"{int(wrong.sum())} values are {kind}"
    return Verdict(False, reason, math.inf, math.inf, math.inf, error_pattern(wrong))


def blocks_agree(
    output: Tensor, expected: Tensor, blocks: int, randrange: Callable[[int], int], rounding: float = 0.0
) -> bool:
    """Whether random blocks agree to well within what separates right from wrong (not: from imprecise).

    ``rounding``: how large values are that are nothing else (``Expected.rounding``).
    """
    flat, want = as_real(output).reshape(-1), as_real(expected).reshape(-1)
    n = flat.numel()
    if not n:
        return True
    starts = [randrange(max(1, n - BLOCK + 1)) for _ in range(min(blocks, 1 + n // BLOCK))]
    index = (torch.tensor(starts).unsqueeze(1) + torch.arange(min(BLOCK, n))).reshape(-1)
    a, b = flat[index], want[index]
    if not b.is_floating_point():
        return int((a != b).sum()) <= a.numel() // 100
    a, b = a.double(), b.double()
    finite = torch.isfinite(b)
    if not torch.equal(torch.isfinite(a), finite):
        return False
    b = torch.where(finite, b, 0.0)
    slack = {torch.float64: 1e-9, torch.float32: 1e-4}.get(want.dtype, 2e-2)
    far = slack * (b.abs() + b.abs().max()) + 2 * CLOSE * rounding
    near = (torch.where(finite, a, 0.0) - b).abs() <= far
    return bool(near.all())


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
    share = f"{count} of {total} elements ({100 * count / total:.3g} %)"
    return share + (": " + ", ".join(words) if words else ": scattered")
