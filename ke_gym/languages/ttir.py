"""Which pointers a Triton kernel writes through, read from its Triton IR text.

Flow-insensitive: every value of pointer type remembers which kernel arguments it may come from. What a loop or
a branch carries is joined by position, what a helper function takes by its calls.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_FUNCTION = re.compile(r"tt\.func (?:public |private |noinline )*@(?P<name>[\w$.\"]+)\((?P<arguments>.*)\)")
_ARGUMENT = re.compile(r"(%[\w$.-]+): ((?:!tt\.(?:ptr|tensordesc)|tensor<[^%]*!tt\.ptr|!ttng)?)")
_OPERATION = re.compile(r"^\s*(?:(?P<results>%[\w$.:, -]+?) = )?(?P<name>[\w.]+|\"[\w.]+\")(?P<rest>.*)$")
_VALUE = re.compile(r"%[\w$.-]+(?:#\d+)?")
_WRITES = ("tt.store", "tt.atomic_rmw", "tt.atomic_cas", "tt.descriptor_store", "tt.descriptor_reduce",
           "tt.descriptor_scatter")  # fmt: skip
_MAKE = ("tt.make_tensor_descriptor", "tt.make_tensor_ptr")  # their types are not always spelled out
_LOADS = ("tt.load", "tt.descriptor_load", "tt.descriptor_gather")


class _Values:
    """Disjoint sets of values that may be the same pointer."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def find(self, value: str) -> str:
        root = value
        while self._parent.setdefault(root, root) != root:
            root = self._parent[root]
        self._parent[value] = root
        return root

    def join(self, values: Iterable[str]) -> None:
        first, *others = list(values) or [""]
        for other in others:
            self._parent[self.find(other)] = self.find(first)


def written(ttir: str, kernel: str) -> frozenset[int]:
    """Positions among the arguments of ``kernel`` (as in the IR) whose memory it may write."""
    values = _Values()
    stores: list[str] = []
    arguments: dict[str, list[str]] = {}
    calls: list[tuple[str, list[str]]] = []
    scope = ""
    regions: list[tuple[str, list[str]]] = []  # results and loop-carried values of open regions
    for line in ttir.splitlines():
        text = line.split(" loc(", 1)[0] if "tt.func" not in line else line
        if (function := _FUNCTION.search(text)) is not None:
            scope = function["name"].strip('"')
            arguments[scope] = [scope + m[1] for m in _ARGUMENT.finditer(function["arguments"])]
            regions = []
            continue
        operation = _OPERATION.match(text)
        if operation is None:
            if text.strip().startswith("}") and regions and "else" not in text and "do" not in text:
                regions.pop()
            continue
        name, rest = operation["name"].strip('"'), operation["rest"]
        used = [scope + v for v in _VALUE.findall(rest.split(" : ")[0])]
        results = _results(scope, operation["results"])
        if name in _WRITES:
            stores += used[:1]
        elif name == "tt.call":
            callee = re.match(r"\s*@([\w$.\"]+)", rest)
            calls.append((callee[1].strip('"') if callee else "", used))
            if "!tt.ptr" in text.rsplit("->", 1)[-1]:
                values.join([*results, *used])
        elif name == "scf.for":
            pairs = re.findall(r"(%[\w$.-]+) = (%[\w$.-]+(?:#\d+)?)", rest)
            carried = [(scope + a, scope + b) for a, b in pairs if rest.find("iter_args") >= 0]
            carried = carried[-len(results) :] if results else []
            for result, (inside, initial) in zip(results, carried):
                values.join([result, inside, initial])
        elif name in ("scf.yield", "scf.condition"):
            if regions:
                kind, outer = regions[-1]
                if kind == "scf.while":
                    values.join([*outer, *used])
                else:
                    for result, value in zip(outer, used):
                        values.join([result, value])
        elif name == "scf.while":
            values.join([*results, *used])
        elif name not in _LOADS and results and (name in _MAKE or _pointer(text)):
            several = {"arith.select": used[1:], "tt.join": used, "tt.cat": used}
            values.join([*results, *several.get(name, used[:1])])
        if text.rstrip().endswith("{") and name != "module":
            regions.append((name, results))
    for target, passed in calls:
        for inside, outside in zip(arguments.get(target, ()), passed):
            values.join([inside, outside])
    roots = {values.find(store) for store in stores}
    return frozenset(k for k, name in enumerate(arguments.get(kernel, ())) if values.find(name) in roots)


def _pointer(text: str) -> bool:
    types = text.rsplit(" : ", 1)[-1]
    return "!tt.ptr" in types or "tensordesc" in types


def _results(scope: str, text: str | None) -> list[str]:
    if not text:
        return []
    found: list[str] = []
    for part in text.split(","):
        name, _, count = part.strip().partition(":")
        found += [f"{scope}{name}#{k}" for k in range(int(count))] if count else [scope + name]
    return found
