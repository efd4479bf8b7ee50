"""The schedule: every choice about how a graph is computed, as immutable data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

DEFAULT_FLAGS = ("-mprefer-vector-width=512",)


@dataclass(frozen=True)
class Group:
    """Nodes computed by one loop nest, in topological order.

    A nest runs outer loops (in parallel, if the work is worth it) around stages that share the outer indices.

    nodes: the graph's node names computed here.
    anchor: the node whose loops are the outer ones; "" lets the nest builder choose.
    outer: (position among the anchor's output then reduced loops, tile) of each outer loop; tile 1 takes the
        whole loop outside, a larger tile takes the loop over tiles outside and leaves the rest inside.
    staged: pointwise nodes kept in a buffer per outer iteration instead of being recomputed by each user.
    accumulators: independent partial results of each innermost reduction.
    grain: least scalar operations worth a thread.
    prefetch: how far ahead inputs are fetched, in outer iterations or thousands of elements, whichever is
        more; 0 leaves it to the hardware.
    peel: split loops where an index test changes, so that their bodies have no tests.
    order: innermost loop by position among a stage's loops, counted from the innermost of the natural order.
    dynamic: hand outer iterations to threads in small pieces rather than one equal share each.
    reciprocal: divide by what a loop does not change once, and multiply by that.
    one_pass: take a mean with its variance, and a maximum with its sum of exponentials, in one pass over the row
        (``one_pass``); two passes are lowered.
    simd: lanes per iteration the compiler is asked for; 0 leaves it to the compiler.
    stream: MiB from which on a result goes past the caches, where it is written in memory order and the nest
        does not read it; 0 keeps all in the caches.
    contraction: knobs of the group's matrix product or convolution that differ from the heuristic ones.
    launch: knobs of the group's kernel on a GPU that differ from the heuristic ones (blocks, warps, stages).
    """

    nodes: tuple[str, ...]
    anchor: str = ""
    outer: tuple[tuple[int, int], ...] = ()
    staged: tuple[str, ...] = ()
    accumulators: int = 4
    grain: int = 16384
    prefetch: int = 0
    peel: bool = False
    order: int = 0
    dynamic: bool = False
    reciprocal: bool = False
    one_pass: bool = False
    simd: int = 0
    stream: int = 8
    contraction: tuple[tuple[str, Any], ...] = ()
    launch: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Plan:
    """Schedule of one shape set: nests in execution order. Library calls stand between them by data flow."""

    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Schedule:
    """One plan per public shape set, and what holds for the whole kernel module.

    merged: consecutive nests become one kernel, so that fewer launches are paid for.
    prepared: what depends on weights alone is declared a preparation, done once (``preparation``).
    """

    plans: tuple[Plan, ...]
    flags: tuple[str, ...] = DEFAULT_FLAGS
    compiler: str = "g++"
    merged: bool = False
    prepared: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """Raises ``ValueError`` if the text is no schedule."""
        try:
            data = json.loads(text)
            plans = tuple(Plan(tuple(_group(g) for g in p["groups"])) for p in data["plans"])
            prepared = data.get("prepared", False)
            return cls(plans, tuple(data["flags"]), data["compiler"], data["merged"], prepared)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a schedule: {error!r}") from error


def _group(data: dict[str, Any]) -> Group:
    values = {f.name: data[f.name] for f in fields(Group)}
    values["outer"] = tuple((int(p), int(t)) for p, t in values["outer"])
    values["contraction"] = tuple((str(k), _frozen(v)) for k, v in values["contraction"])
    values["launch"] = tuple((str(k), _frozen(v)) for k, v in values["launch"])
    values["nodes"], values["staged"] = tuple(values["nodes"]), tuple(values["staged"])
    return Group(**values)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value
