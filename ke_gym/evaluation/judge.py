"""The judge: the trusted process that draws inputs, runs the baseline, and compares outputs with the oracle.

It is forked from the zygote, never sees candidate code, and is the only process that holds expected values.
The parent tells it what to do (`JudgeClient`) and keeps the clock; a candidate shares nothing with it but the
read-only inputs and its own output buffer.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ke_gym.errors import UserError
from ke_gym.evaluation import mutants, work
from ke_gym.evaluation.acceptance import UNSEEN, Expected, Pool, Size, blocks_agree, compare, largest
from ke_gym.evaluation.channel import Channel
from ke_gym.evaluation.evaluation import COMPILE_MODES
from ke_gym.evaluation.shared import Layout, SharedBuffer
from ke_gym.languages.base import Signature
from ke_gym.languages.plan import TensorSpec
from ke_gym.tasks.inputs import keep_secret, touch
from ke_gym.tasks.task import Reference, Task

SAMPLED_BLOCKS = 24
CASE_BYTES = 1 << 30
IDLE_S = 3600.0


@dataclass
class Case:
    """One drawn set of inputs (and parameter values) with the trusted results."""

    inputs: list[Tensor]
    state: list[Tensor]
    expected: tuple[Expected, ...]
    refused: str = ""
    """Why the reference has no results, if it raises."""

    @property
    def bytes(self) -> int:
        return _bytes(self.inputs) + sum(_bytes([e.reference, e.oracle]) for e in self.expected)

    @property
    def finite(self) -> float:
        """The smallest share of finite values in any expected output; 0 where the reference raises."""
        if self.refused:
            return 0.0
        masks = [e.mask for e in self.expected if e.mask is not None]
        return min((float(m.double().mean()) for m in masks), default=1.0)


@dataclass
class ShapeSet:
    """What the judge keeps of one shape set."""

    name: str
    reference: Reference
    arguments: list[Any]
    work: work.Work
    buffer: SharedBuffer | None = None
    inputs: list[Tensor] = field(default_factory=list)
    state: list[Tensor] = field(default_factory=list)
    cases: dict[tuple[int, str, int], Case] = field(default_factory=dict)
    current: Case | None = None
    baseline: Any = None
    last: tuple[Tensor, ...] = ()
    sizes: Sequence[Size] = ()
    """Of each output on the task's own inputs: its root mean square, and its ``Expected.rounding``; the largest seen."""


class Judge:
    """The server side. One method per request; each returns a JSON-able dict (and maybe a blob)."""

    def __init__(self, channel: Channel, task: Task, baseline: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.channel = channel
        self.task = task
        self.baseline = baseline
        self.sets: dict[str, ShapeSet] = {}
        self.outputs: dict[int, list[Tensor]] = {}
        self.buffers: dict[int, SharedBuffer] = {}
        self.pools: dict[int, Pool] = {}
        """Close calls, by arm."""

    # -- shape sets ------------------------------------------------------------------------------------------

    def describe(self, shape_sets: list[str]) -> tuple[dict[str, Any], bytes]:
        """Build the references; return tensor specs per shape set and, as blob, the compile signature."""
        described = {}
        for name in shape_sets:
            reference = self.task.reference(name, seed=0)
            arguments = self.task.inputs(name, seed=0)
            counted = work.count(reference, arguments)
            self.sets[name] = ShapeSet(name, reference, arguments, counted)
            outputs = self._run(self.sets[name])
            self.sets[name].sizes = [UNSEEN] * len(outputs)
            described[name] = {
                "inputs": [_spec(t) for t in arguments if isinstance(t, Tensor)],
                "state": {key: _spec(t) for key, t in reference.state.items()},
                "outputs": [_spec(t) for t in outputs],
                "work": asdict(counted),
            }
        signature = Signature.of(self.task, shape_sets)
        return {"shapes": described}, signature.to_bytes()

    def attach(self, shape_set: str, layout: dict[str, Any]) -> dict[str, Any]:
        """Map the shared input buffer, whose descriptor came along, and fill it once."""
        chosen = self.sets[shape_set]
        placed = Layout.from_dict(layout)
        chosen.buffer = SharedBuffer.from_fd(self._received(), placed.bytes, writable=True)
        chosen.inputs, state = placed.split(chosen.buffer)
        chosen.state = list(state.values())
        self._store_state(chosen)
        self._store_inputs(chosen, chosen.arguments)
        chosen.baseline = self._baseline(chosen)
        return {}

    def attach_output(self, arm: int, layout: dict[str, Any]) -> dict[str, Any]:
        """Map an arm's output buffer, whose descriptor came along."""
        placed = Layout.from_dict(layout)
        self.buffers[arm] = SharedBuffer.from_fd(self._received(), placed.bytes, writable=False)
        self.outputs[arm] = placed.views(self.buffers[arm])
        return {}

    def detach_output(self, arm: int) -> dict[str, Any]:
        self.outputs.pop(arm, None)
        self.pools.pop(arm, None)
        buffer = self.buffers.pop(arm, None)
        if buffer is not None:
            buffer.close()
        return {}

    def _baseline(self, chosen: ShapeSet) -> Reference:
        mode = COMPILE_MODES.get(self.baseline)
        if mode is None:
            return chosen.reference
        compiled = chosen.reference.compiled(mode)
        compiled(*self._arguments(chosen))
        return compiled

    # -- inputs ----------------------------------------------------------------------------------------------

    def draw(self, shape_set: str, seed: int) -> dict[str, Any]:
        """Fresh contents for a timed call; the oracle is computed later, and only if it is asked for."""
        chosen = self.sets[shape_set]
        self._store_inputs(chosen, self.task.inputs(shape_set, seed))
        chosen.current = None
        return {}

    def load(self, shape_set: str, seed: int, distribution: str, state_seed: int) -> dict[str, Any]:
        """Put a checked case into the shared inputs; expected values are computed once per case and kept."""
        chosen = self.sets[shape_set]
        key = (seed, distribution, state_seed)
        case = chosen.cases.get(key)
        if case is None:
            if state_seed:
                chosen.reference.randomize(state_seed)
            arguments = self.task.inputs(shape_set, seed, distribution)
            chosen.arguments = arguments
            self._store_state(chosen)
            self._store_inputs(chosen, arguments)
            try:
                case = self._solve(chosen, distribution == "zeros")
            except UserError as error:  # of a matrix that has no inverse, say: it need not take such inputs
                if distribution == "task":
                    raise
                case = Case(_copies(chosen.inputs), _copies(chosen.state), (), str(error))
            if distribution == "task":
                chosen.sizes = largest(chosen.sizes, [e.size for e in case.expected])
            self._keep(chosen, key, case)
        else:
            _copy(chosen.inputs, case.inputs)
            _copy(chosen.state, case.state)
            _copy(list(chosen.reference.state.values()), case.state)
        chosen.current = case
        return {"finite": case.finite, "refused": case.refused}

    def touch(self, shape_set: str, seed: int) -> dict[str, Any]:
        """Change one element of every floating input and parameter, and nothing else."""
        chosen = self.sets[shape_set]
        touch((*chosen.inputs, *chosen.state), seed)
        _copy(list(chosen.reference.state.values()), chosen.state)
        case = chosen.cases.get(key := (seed, "touched", 0))
        if case is None:
            case = self._solve(chosen)
            self._keep(chosen, key, case)
        chosen.current = case
        return {}

    def _keep(self, chosen: ShapeSet, key: tuple[int, str, int], case: Case) -> None:
        if case.bytes + sum(c.bytes for c in chosen.cases.values()) < CASE_BYTES:
            chosen.cases[key] = case

    def renew(self, shape_set: str, seed: int) -> dict[str, Any]:
        """New parameter values for the calls to come: what a module was built for is not what is timed."""
        chosen = self.sets[shape_set]
        chosen.reference.randomize(seed)
        self._store_state(chosen)
        chosen.current = None
        return {}

    def _solve(self, chosen: ShapeSet, zeros: bool = False) -> Case:
        """The trusted results for what is in the shared inputs now.

        Where every input is zero, outputs are often differences of equal numbers: what rounding leaves of them is measured
        against what the task's own inputs give.
        """
        arguments = self._arguments(chosen)
        references = _copies(self._run(chosen))
        oracles = chosen.reference.double()(*arguments)
        length = chosen.work.reduction_length
        expected = tuple(
            Expected(r, o, self.task.precision, self.task.tolerance, length, size if zeros else 0.0, rounding)
            for r, o, (size, rounding) in zip(references, oracles, chosen.sizes, strict=True)
        )
        return Case(_copies(chosen.inputs), _copies(chosen.state), expected)

    # -- the baseline ----------------------------------------------------------------------------------------

    def baseline_ready(self, shape_set: str) -> None:
        """Serve one timed baseline call."""
        chosen = self.sets[shape_set]
        arguments = self._arguments(chosen)

        def run() -> None:
            chosen.last = chosen.baseline(*arguments)

        self._serve_byte(run)

    def null_ready(self) -> None:
        """Serve one timed call that does nothing: what a round trip itself costs."""
        self._serve_byte(lambda: None)

    # -- verdicts --------------------------------------------------------------------------------------------

    def check(self, shape_set: str, arm: int) -> dict[str, Any]:
        """Full comparison of an arm's outputs with the oracle for what is in the shared inputs now.

        ``close`` says that it is a close call, which ``check_again`` decides.
        """
        verdict, pool = compare(self.outputs[arm], self._current(shape_set).expected)
        self.pools.pop(arm, None)
        if pool is not None:
            self.pools[arm] = pool
        return verdict.to_dict()

    def check_again(self, shape_set: str, arm: int) -> dict[str, Any]:
        """The verdict on a close call, with what the arm computed of other contents, which are in place now."""
        case = self._current(shape_set)
        if case.finite >= 0.5:
            self.pools[arm].add(self.outputs[arm], case.expected)
        return self.pools[arm].verdict().to_dict()

    def _current(self, shape_set: str) -> Case:
        chosen = self.sets[shape_set]
        if chosen.current is None:
            chosen.current = self._solve(chosen)
        return chosen.current

    def fingerprint(self, shape_set: str, arms: list[int]) -> dict[str, Any]:
        """Compare random blocks of each arm's outputs with the baseline's outputs of the same inputs.

        Cheap enough for every timed call; a suspicion (returned by arm) is settled by `check`.
        """
        chosen = self.sets[shape_set]
        suspects = []
        for arm in arms:
            for output, expected, (_, rounding) in zip(
                self.outputs[arm], chosen.last, chosen.sizes, strict=True
            ):
                if not blocks_agree(output, expected, SAMPLED_BLOCKS, random.randrange, rounding):
                    suspects.append(arm)
                    break
        return {"suspects": suspects}

    def mutants(self, shape_set: str, cases: list[tuple[int, str, int]]) -> dict[str, Any]:
        """Whether each mutant of the reference is rejected on one of the cases."""
        chosen = self.sets[shape_set]
        results: dict[str, bool] = {}
        for seed, distribution, state_seed in cases:
            self.load(shape_set, seed, distribution, state_seed)
            assert chosen.current is not None
            if chosen.current.refused:
                continue
            other = self.task.inputs(shape_set, seed + 1, distribution)
            given = self._arguments(chosen)
            for mutant in mutants.mutants(chosen.reference, given, other, self.task.precision):
                rejected = not compare(mutant.outputs, chosen.current.expected)[0].ok
                results[mutant.name] = results.get(mutant.name, False) or rejected
            if all(results.values()):
                break
        return {"mutants": results}

    def self_verdict(self, shape_set: str) -> dict[str, Any]:
        """The reference judged as if it were a candidate."""
        chosen = self.sets[shape_set]
        case = self._solve(chosen)
        return compare(self._run(chosen), case.expected)[0].to_dict()

    # -- helpers ---------------------------------------------------------------------------------------------

    def _received(self) -> int:
        (fd,) = self.channel.take_fds()
        return fd

    def _serve_byte(self, run: Any) -> None:
        """Answer, then serve one timed call: one byte in, run, one byte out."""
        self.channel.send({})
        if self.channel.recv_byte(IDLE_S):
            run()
            self.channel.sock.send(b"d")

    def _arguments(self, chosen: ShapeSet) -> list[Any]:
        """The reference's arguments, its tensors being the shared ones."""
        shared = iter(chosen.inputs or [a for a in chosen.arguments if isinstance(a, Tensor)])
        return [next(shared) if isinstance(a, Tensor) else a for a in chosen.arguments]

    def _run(self, chosen: ShapeSet) -> tuple[Tensor, ...]:
        return chosen.reference(*self._arguments(chosen))

    def _store_inputs(self, chosen: ShapeSet, arguments: list[Any]) -> None:
        _copy(chosen.inputs, [a for a in arguments if isinstance(a, Tensor)])

    def _store_state(self, chosen: ShapeSet) -> None:
        _copy(chosen.state, list(chosen.reference.state.values()))


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)


def _copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _spec(tensor: Tensor) -> list[Any]:
    spec = TensorSpec.of(tensor)
    return [list(spec.shape), list(spec.stride), spec.dtype]


def serve(channel: Channel, args: dict[str, Any], fds: list[int]) -> None:
    """Entry of the judge process: the first message carries the task, then requests until the parent leaves."""
    _, blob = channel.recv(timeout=None)
    random.seed()  # not by the arguments: the zygote has read them, and every candidate is a copy of it
    keep_secret()
    if args["baseline"] in COMPILE_MODES:
        torch._inductor.config.compile_threads = 1
        Path("/tmp").mkdir(exist_ok=True)
    try:
        judge = Judge(channel, Task.from_bytes(blob), args["baseline"], args["threads"])
        channel.send({})
    except UserError as error:
        channel.send({"user_error": str(error)})
        return
    while True:
        try:
            header, _ = channel.recv(timeout=None, accept_fds=True)
        except EOFError:
            return
        request = header.pop("do")
        try:
            if request in ("baseline_ready", "null_ready"):
                getattr(judge, request)(**header)
                continue
            answer = getattr(judge, request)(**header)
            channel.send(*answer) if isinstance(answer, tuple) else channel.send(answer)
        except UserError as error:
            channel.send({"user_error": str(error)})
        except Exception as error:  # the parent turns it into a clear message about the task
            channel.send({"task_error": f"{type(error).__name__}: {error}"})
