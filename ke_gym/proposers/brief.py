"""What a prompt says of the task and the machine, the same for a whole search."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from ke_gym import syntax
from ke_gym.languages.base import Signature
from ke_gym.languages.plan import TensorSpec
from ke_gym.proposers import kept_back
from ke_gym.targets import cpu
from ke_gym.tasks import Task

if TYPE_CHECKING:
    from ke_gym.evaluation.evaluator import Evaluator

# Of a task file, these say how it is judged (or name shapes that are kept secret), not what it computes.
_KEPT_BACK = {"shapes", "tolerance", "family", "precision", "backward"}
# What follows a statement on its line and goes with it: the semicolon, or its comment.
_COMMENT = re.compile(rb"\A[ \t]*#.*")
_AFTER = re.compile(rb"\A[ \t]*;?[ \t]*(#.*)?")

PRECISION = {
    "strict": "full: compute in the dtype of the data or a wider one, accumulate float16 and bfloat16 in float32;"
    " no TF32 and no bfloat16 products",
    "tf32": "TF32 products are permitted, accumulated in float32",
    "bf16": "bfloat16 products are permitted, accumulated in float32",
}


@dataclass(frozen=True)
class Argument:
    """One input or one entry of the state: its name in ``forward`` and what it is."""

    name: str
    what: str


@dataclass(frozen=True)
class Brief:
    """Facts for prompts. ``machine`` are lines; ``floor_ms`` is the least time its bytes and FLOPs take there;
    ``shapes`` holds, per public shape set (the timed one first), inputs, state and outputs."""

    task: Task
    target: str
    baseline: str
    timed: str
    shapes: Mapping[str, tuple[tuple[Argument, ...], tuple[Argument, ...], tuple[str, ...]]]
    bytes_moved: float
    flops: float
    floor_ms: float
    machine: tuple[str, ...]

    @classmethod
    def of(cls, evaluator: Evaluator) -> Brief:
        """The brief of a search that this evaluator judges."""
        signature = Signature.from_bytes(evaluator.judge.signature)
        names = input_names(evaluator.task.source)
        work = evaluator.judge.shapes[evaluator.contract].work
        return cls(
            evaluator.task,
            evaluator.target,
            evaluator.baseline,
            evaluator.contract,
            {name: _shape(signature, name, names) for name in evaluator.shape_sets},
            work.bytes,
            work.flops,
            1e3 * evaluator.peaks.floor_s(work.bytes, work.floor_flops),
            machine(evaluator.facts, evaluator.peaks),
        )

    @classmethod
    def unmeasured(cls, task: Task, machine: Sequence[str]) -> Brief:
        """The brief of a search on a CPU for a task that nobody has prepared: no least work, the rest is there."""
        signature, names = Signature.of(task), input_names(task.source)
        shapes = {name: _shape(signature, name, names) for name in signature.shape_sets}
        return cls(task, "cpu", "eager", task.contract("cpu"), shapes, 0.0, 0.0, 0.0, tuple(machine))

    @property
    def inputs(self) -> tuple[Argument, ...]:
        return self.shapes[self.timed][0]

    @property
    def state(self) -> tuple[Argument, ...]:
        return self.shapes[self.timed][1]

    @property
    def source(self) -> str:
        """The reference without what says how it is judged."""
        return published(self.task.source)

    @property
    def sizes(self) -> str:
        """The globals of the timed shape set, as assignments."""
        return ", ".join(f"{k} = {v!r}" for k, v in self.task.shapes.get(self.timed, {}).items())


def _shape(
    signature: Signature, name: str, names: Sequence[str]
) -> tuple[tuple[Argument, ...], tuple[Argument, ...], tuple[str, ...]]:
    inputs = signature.inputs[name]
    called = [names[i] if i < len(names) else f"input{i}" for i in range(len(inputs))]
    return (
        tuple(Argument(c, describe(v)) for c, v in zip(called, inputs)),
        tuple(Argument(key, describe(spec)) for key, spec in signature.state[name].items()),
        tuple(describe(spec) for spec in signature.outputs[name]),
    )


def describe(value: Any) -> str:
    """``float32 [2048, 512]``; strides are named where a tensor is not contiguous; plain values as they are."""
    if not isinstance(value, TensorSpec):
        return repr(value)
    text = f"{value.dtype} {list(value.shape)}"
    step, dense = 1, []
    for size in reversed(value.shape):
        dense.append(step)
        step *= size
    return text if value.stride == tuple(reversed(dense)) else f"{text}, strides {list(value.stride)}"


def input_names(source: str) -> tuple[str, ...]:
    """The parameters of ``Model.forward`` (of the last class that has a ``forward``), as the reference names them."""
    try:
        classes = [node for node in syntax.parse(source).body if isinstance(node, ast.ClassDef)]
    except SyntaxError:
        return ()
    classes.sort(key=lambda node: node.name == "Model")
    for node in reversed(classes):
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and item.name == "forward":
                return tuple(a.arg for a in [*item.args.posonlyargs, *item.args.args][1:])
    return ()


def published(source: str) -> str:
    """A task file's text without the statements that are kept back, and without what only these need."""
    source = source.replace("\r\n", "\n").replace("\r", "\n").removeprefix("\ufeff")
    try:
        tree = syntax.parse(source)
        changes = kept_back.changes(tree, _KEPT_BACK)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return source
    lines = source.encode().split(b"\n")  # the tree counts bytes
    for node, text in reversed(changes):
        first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
        head, tail = lines[first][: node.col_offset], lines[last][node.end_col_offset :]
        if text:
            line = head + text.encode() + _COMMENT.sub(b"", tail)
        else:
            tail = _AFTER.sub(b"", tail)
            line = head + tail if tail else head.rstrip(b" \t;")
        lines[first : last + 1] = [line] if line.strip() else []
    return b"\n".join(lines).decode().strip()


def machine(facts: Any, peaks: Any) -> tuple[str, ...]:
    """The device's facts and measured peaks as lines; those of a plug-in's device field by field."""
    if isinstance(facts, cpu.Facts) and isinstance(peaks, cpu.Peaks):
        return _cpu(facts, peaks)
    known = [part for part in (facts, peaks) if hasattr(part, "__dataclass_fields__")]
    return tuple(
        f"{f.name.replace('_', ' ')}: {_plain(getattr(part, f.name))}" for part in known for f in fields(part)
    )


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cpu(facts: cpu.Facts, peaks: cpu.Peaks) -> tuple[str, ...]:
    rates = [(size, peaks.bytes_per_s(size)) for size in (1 << 18, 1 << 21, 1 << 24, 1 << 28)]
    bandwidth = ", ".join(f"{rate / 1e9:.0f} GB/s within {size_text(size)}" for size, rate in rates)
    return (
        f"{facts.model.strip()} ({facts.arch}), {peaks.threads} OpenMP thread(s), one per core",
        f"vectors of {facts.vector_bits} bits ({facts.vector_bits // 32} floats);"
        f" {'AMX bfloat16 tiles' if facts.matrix_unit else 'no matrix unit'}",
        f"L1d {size_text(facts.l1_bytes)} and L2 {size_text(facts.l2_bytes)} per core, L3 {size_text(facts.l3_bytes)} shared",
        f"measured peaks, all threads together: {peaks.fp32 / 1e9:.0f} GFLOP/s of float32 FMA,"
        f" {peaks.fp64 / 1e9:.0f} of float64",
        f"measured bandwidth by working set: {bandwidth}",
    )


def size_text(size: float) -> str:
    """Bytes in the largest unit that leaves at least one."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} GiB"
