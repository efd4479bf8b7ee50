"""Which nodes share a loop nest: the heuristic first schedule, and the legality of any grouping."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from ke_gym.codegen import (
    attend,
    attentions,
    bags,
    contract,
    flash,
    matmuls,
    pairs,
    products,
    searches,
    thin_products,
    tiling,
    windows,
)
from ke_gym.codegen.continuity import continuous
from ke_gym.codegen.contract import Contraction
from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.expr import InRange, Op, walk
from ke_gym.codegen.graph import Extern, Graph, Node
from ke_gym.codegen.nest import COSTLY, Nest
from ke_gym.codegen.nesting import Builder
from ke_gym.codegen.schedule import Group, Plan

MAX_NODES = 64


def visible_in(graph: Graph, group: Sequence[str], groups: Iterable[Sequence[str]]) -> frozenset[str]:
    """The nodes of ``group`` it must store: outputs, and what steps outside of it read.

    A node that several groups compute is stored by the first of them.
    """
    listed = [tuple(g) for g in groups]
    owner, members = _homes(graph, listed)
    here = listed.index(tuple(group))
    found = set()
    for name in group:
        if owner[name] != here:
            continue
        needed = name in graph.outputs
        for user in graph.users[name]:
            homes = members.get(user)
            needed = needed or homes is None or any(name not in home for home in homes)
        if needed:
            found.add(name)
    return frozenset(found)


def _homes(graph: Graph, listed: list[tuple[str, ...]]) -> tuple[dict[str, int], dict[str, list[set[str]]]]:
    """By node, the first of the groups that compute it, and all of them; kept, since each of them is asked about in turn."""
    known, owner, members = graph.memo.get("homes", (None, {}, {}))
    if known != listed:
        owner, members = {}, {}
        for k, nodes in enumerate(listed):
            inside = set(nodes)
            for name in nodes:
                owner.setdefault(name, k)
                members.setdefault(name, []).append(inside)
        graph.memo["homes"] = listed, owner, members
    return owner, members


def nests(graph: Graph, plan: Plan) -> list[Nest | Contraction]:
    """The plan's nests. Raises ``Illegal`` if one cannot be built or they cannot be ordered."""
    groups = [g.nodes for g in plan.groups]
    covered = {n for g in groups for n in g}
    computed = {n for n, s in graph.steps.items() if isinstance(s, Node)}
    if not computed <= covered or not covered <= set(graph.steps):
        raise Illegal(f"the schedule does not cover {sorted(computed - covered)}")
    order_steps(graph, plan)
    return [cached_nest(graph, g, visible_in(graph, g.nodes, groups)) for g in plan.groups]


def plain(group: Group) -> Group:
    """``group`` without what only says how its nest is printed and run: one nest serves all such settings."""
    usual = Group(())
    return replace(
        group, accumulators=usual.accumulators, grain=usual.grain, prefetch=usual.prefetch,
        dynamic=usual.dynamic, simd=usual.simd, stream=usual.stream,
    )  # fmt: skip


def cached_nest(graph: Graph, group: Group, visible: frozenset[str]) -> Nest | Contraction:
    key = ("nest", group, visible)
    found: Nest | Contraction | Illegal | None = graph.memo.get(key)
    if found is None:
        try:
            if group != plain(group):
                nest = cached_nest(graph, plain(group), visible)
                found = replace(nest, group=replace(group, anchor=nest.group.anchor, outer=nest.group.outer))
            else:
                found = _builder(graph, group)(graph, group, visible).build()
        except Illegal as reason:
            found = reason
        graph.memo[key] = found
    if isinstance(found, Illegal):
        raise Illegal(str(found))
    return found


def _builder(graph: Graph, group: Group) -> Any:
    """What builds a group of no product, of one, or of two with a softmax between them."""
    kinds: tuple[Any, ...] = (Builder, contract.Builder, attend.Builder)
    if graph.device == "cuda":
        kinds = (tiling.Builder, products.Builder, flash.Builder)
    called = attend.products_of(graph, group.nodes)
    count = min(len(called), 2)
    if graph.device == "cuda" and count == 1 and called[0].target in bags.KINDS:
        return bags.Builder
    if count and windows.LANGUAGE in (graph.language, dict(group.launch).get("language")):
        if count == 2 and called[1].target == flash.KIND:
            return attentions.Builder
        return matmuls.Builder if count == 1 else pairs.Builder
    if graph.device == "cuda" and not count and dict(group.launch).get("language") == windows.LANGUAGE:
        return searches.Builder
    if graph.device == "cuda" and thin_products.apart(graph, called) is not None:
        return thin_products.Builder
    if group.one_pass and kinds[count] is not Builder:
        raise Illegal("only loop nests take statistics in one pass")
    return kinds[count]


def order_steps(graph: Graph, plan: Plan) -> list[Group | Extern]:
    """Groups and library calls in an order that respects data flow; ``Illegal`` if there is a cycle."""
    covered = {n for g in plan.groups for n in g.nodes}
    calls = [s for n, s in graph.steps.items() if isinstance(s, Extern) and n not in covered]
    units: list[Group | Extern] = [*plan.groups, *calls]
    listed = [g.nodes for g in plan.groups]
    maker: dict[str, int] = {}
    needs: list[set[str]] = []
    for k, unit in enumerate(units):
        if isinstance(unit, Extern):
            for buffer in unit.outputs:
                maker[buffer.name] = k
            needs.append(set(unit.reads))
        else:
            for name in visible_in(graph, unit.nodes, listed):
                maker[name] = k
            reads: set[str] = set()
            for name in unit.nodes:
                reads.update(graph.steps[name].reads)
            needs.append(reads - set(unit.nodes))
    rank = {name: k for k, name in enumerate(graph.steps)}

    def first(k: int) -> int:
        unit = units[k]
        names = [unit.name] if isinstance(unit, Extern) else list(unit.nodes)
        return min(rank[n] for n in names)

    done: dict[int, None] = {}
    pending = sorted(range(len(units)), key=first)
    while pending:
        ready = next(
            (k for k in pending if all(maker[n] in done for n in needs[k] if n in maker)),
            None,
        )
        if ready is None:
            raise Illegal("the groups depend on each other")
        done[ready] = None
        pending.remove(ready)
    return [units[k] for k in done]


def legal(graph: Graph, plan: Plan) -> bool:
    try:
        nests(graph, plan)
    except Illegal:
        return False
    return True


# ------------------------------------------------------------------------------------------- heuristics


def expensive(node: Node) -> bool:
    return any(isinstance(n, Op) and n.name in COSTLY for n in walk(node.expr))


def unfused(graph: Graph) -> Plan:
    """Each node in a nest of its own."""
    return Plan(tuple(Group((n,)) for n, s in graph.steps.items() if isinstance(s, Node)))


def fused(graph: Graph) -> Plan:
    """Greedy fusion: every node joins the groups of what it reads, or of what reads the same, if legal."""
    groups: list[list[str]] = []
    home: dict[str, int] = {}

    def comes_back(inside: set[str]) -> bool:
        """Whether a path leaves these nodes and, by way of other groups, comes back: neither could be computed first."""
        seen, pending = set(inside), [user for name in inside for user in graph.users[name]]
        while pending:
            name = pending.pop()
            if name in seen:
                continue
            unit = groups[home[name]] if name in home else [name]
            seen.update(unit)
            after = {user for member in unit for user in graph.users[member]}
            if after & inside:
                return True
            pending += after
        return False

    def attempt(parts: list[list[str]]) -> bool:
        joined = sorted({n for p in parts for n in p}, key=list(graph.steps).index)
        if len(joined) > MAX_NODES:
            return False
        inside = set(joined)
        if comes_back(inside):
            return False
        stored = _needed(graph, inside)
        try:
            cached_nest(graph, Group(tuple(joined)), stored)
        except Illegal:
            return False
        return True

    def merge(a: int, b: int) -> None:
        joined = sorted({*groups[a], *groups[b]}, key=list(graph.steps).index)
        groups[a], groups[b] = joined, []
        for name in joined:
            home[name] = a

    for name, step in graph.steps.items():
        if not isinstance(step, Node):
            continue
        groups.append([name])
        home[name] = len(groups) - 1
        for read in sorted(step.reads, key=lambda r: -list(graph.steps).index(r) if r in graph.steps else 0):
            if (
                read in home
                and home[read] != home[name]
                and attempt([groups[home[read]], groups[home[name]]])
            ):
                merge(home[read], home[name])
    for a in range(len(groups)):
        for b in range(a + 1, len(groups)):
            close = groups[a] and groups[b] and related(graph, groups[a], groups[b])
            if close and attempt([groups[a], groups[b]]):
                merge(a, b)
    chosen = [Group(tuple(g)) for g in groups if g]
    plan = Plan(tuple(sorted(chosen, key=lambda g: list(graph.steps).index(g.nodes[-1]))))
    return Plan(tuple(tuned(graph, g, plan) for g in plan.groups))


def _needed(graph: Graph, inside: set[str]) -> frozenset[str]:
    return frozenset(n for n in inside if n in graph.outputs or any(u not in inside for u in graph.users[n]))


def related(graph: Graph, a: list[str], b: list[str]) -> bool:
    """Whether one reads what the other computes, or both read the same large tensor."""
    made = set(a) | set(b)
    reads_a = {r for n in a for r in graph.steps[n].reads}
    reads_b = {r for n in b for r in graph.steps[n].reads}
    if (reads_a & set(b)) or (reads_b & set(a)):
        return True
    return any(graph.buffers[r].numel >= 1024 for r in (reads_a & reads_b) - made)


def tuned(graph: Graph, group: Group, plan: Plan) -> Group:
    """Keep costly values that several stages of an outer iteration need."""
    return _tuned(graph, group, visible_in(graph, group.nodes, [g.nodes for g in plan.groups]))


def tuned_alone(graph: Graph, group: Group) -> Group:
    """``tuned`` for a group that is not in a plan yet; as it is if it cannot be built."""
    try:
        return _tuned(graph, group, _needed(graph, set(group.nodes)))
    except Illegal:
        return group


def _tuned(graph: Graph, group: Group, visible: frozenset[str]) -> Group:
    nest = cached_nest(graph, group, visible)
    if not isinstance(nest, Nest):
        return group
    # Without divisions there is less work, or more by a product: a group that one thread may do can become one it may not.
    group = replace(group, prefetch=1)
    group = _first_legal(graph, [replace(group, reciprocal=continuous(graph))], visible, group)
    if not nest.outer:
        return bordered(graph, group, visible)
    inside = set(group.nodes)
    staged = []
    for name in group.nodes:
        node = graph.steps[name]
        if (
            not isinstance(node, Node)
            or not node.pointwise
            or name in visible
            or not expensive(node)
            or node.numel <= 1
        ):
            continue
        users = [graph.steps[u] for u in graph.users[name] if u in inside]
        if len(users) > 1 or any(isinstance(u, Node) and u.numel > node.numel for u in users):
            staged.append(name)
    attempts = (replace(group, staged=tuple(staged[:k])) for k in range(len(staged), 0, -1))
    return _first_legal(graph, attempts, visible, group)


def _first_legal(graph: Graph, attempts: Iterable[Group], visible: frozenset[str], otherwise: Group) -> Group:
    """The first of ``attempts`` that can be built."""
    for attempt in attempts:
        try:
            cached_nest(graph, attempt, visible)
            return attempt
        except Illegal:
            continue
    return otherwise


LEAST_OUTER = 16  # outer iterations that keep any number of cores busy


def bordered(graph: Graph, group: Group, visible: frozenset[str]) -> Group:
    """Cut the loops whose index is tested where the tests change, so that no piece tests anything.

    Loops that no test looks at go outside: the pieces of one plane then run while it is in cache.
    """
    if len(visible) != 1:
        return group
    (name,) = visible
    builder = Builder(graph, group, visible)
    node = builder.nodes[name]
    tests = [n.index.terms for n in walk(builder.resolved[name]) if isinstance(n, InRange)]
    tested = {terms[0][0] for terms in tests if len(terms) == 1}
    if not tested & set(node.vars):
        return group
    outer = tuple((k, 1) for k, v in enumerate(node.vars) if v.size != 1 and v not in tested)
    attempts = [replace(group, peel=True)]
    if math.prod(node.vars[k].size for k, _ in outer) >= LEAST_OUTER:
        attempts.insert(0, replace(group, anchor=name, outer=outer, peel=True))
    return _first_legal(graph, attempts, visible, group)


def attended(graph: Graph, plan: Plan) -> Plan:
    """``plan`` with every two products around a softmax as one kernel."""
    order = {n: k for k, n in enumerate(graph.steps)}
    for step in list(graph.steps.values()):
        if not isinstance(step, Extern) or step.target not in contract.GEMM:
            continue
        inside = attend.members(graph, step)
        if inside is None:
            continue
        makers: list[str] = []
        if graph.device == "cuda":  # operands may be computed where they are read
            makers = [r for n in inside for r in graph.steps[n].reads if r in graph.steps and r not in inside]
        attempt = _around(plan, inside, order)
        if makers and not legal(graph, attempt):
            attempt = _around(plan, tuple(sorted({*inside, *makers}, key=lambda n: order[n])), order)
        if legal(graph, attempt):
            near = [*graph.users[step.name], *makers]
            plan = joined(graph, attempt, step.name, near)
    return plan


def _around(plan: Plan, inside: tuple[str, ...], order: dict[str, int]) -> Plan:
    """``plan`` with these steps in one kernel, and out of all others."""
    rest = []
    for group in plan.groups:
        left = tuple(n for n in group.nodes if n not in inside)
        if left:
            rest.append(group if left == group.nodes else Group(left))
    return _added(Plan(tuple(rest)), Group(inside), order)


def contracted(graph: Graph, plan: Plan) -> Plan:
    """``plan`` with every product it leaves to the library taken over, and as much fused around it as is legal."""
    kinds = (*products.KINDS, *bags.KINDS) if graph.device == "cuda" else tuple(contract.KINDS)
    for name, step in graph.steps.items():
        if not isinstance(step, Extern) or step.target not in kinds:
            continue
        if any(name in g.nodes for g in plan.groups):
            continue
        plan = absorb(graph, plan, name)
    return plan


def on_tensor_cores(graph: Graph, plan: Plan) -> Plan:
    """``plan`` with every convolution, small product and attention in CUDA C++ whose kernel is to be had there (see
    ``windows``, ``pairs`` and ``attentions``), two products that follow each other in one."""
    order = {n: k for k, n in enumerate(graph.steps)}
    for first, second in following(graph):
        merged = paired(plan, first, second, order)
        plan = merged if legal(graph, merged) else plan
    if graph.language == windows.LANGUAGE:
        return plan
    return _in_cuda(graph, plan, (pairs.Pairs, windows.Windowed, attentions.Attention))


def in_shared_memory(graph: Graph, plan: Plan) -> Plan:
    """``plan`` with every search that can begin in shared memory in a kernel in CUDA C++ (see ``searches``)."""
    return _in_cuda(graph, plan, (searches.Searched,))


def _in_cuda(graph: Graph, plan: Plan, kinds: tuple[type, ...]) -> Plan:
    """``plan`` with every group in CUDA C++ whose kernel there is of one of these kinds."""
    for k, group in enumerate(plan.groups):
        other = replace(group, launch=(("language", windows.LANGUAGE),))
        changed = Plan((*plan.groups[:k], other, *plan.groups[k + 1 :]))
        try:
            nest: Any = cached_nest(
                graph, other, visible_in(graph, other.nodes, [g.nodes for g in changed.groups])
            )
        except Illegal:
            continue
        if isinstance(nest, kinds) and legal(graph, changed):
            plan = changed
    return plan


def beside(graph: Graph, plan: Plan) -> Plan:
    """``plan`` with thin products in the kernels of those they are added to (see ``thin_products``)."""
    order = {n: k for k, n in enumerate(graph.steps)}
    for group in plan.groups:
        for other in plan.groups:
            calls = [attend.products_of(graph, g.nodes) for g in (group, other)]
            if group is other or [len(c) for c in calls] != [1, 1]:
                continue
            nodes = tuple(sorted({*group.nodes, *other.nodes}, key=lambda n: order[n]))
            rest = Plan(tuple(g for g in plan.groups if g is not group and g is not other))
            merged = _added(rest, Group(nodes), order)
            if thin_products.apart(graph, [calls[0][0], calls[1][0]]) is not None and legal(graph, merged):
                return beside(graph, merged)
    return plan


def following(graph: Graph) -> list[tuple[str, str]]:
    """Library products, and those whose left operand they make."""
    found = []
    for step in graph.steps.values():
        if isinstance(step, Extern) and step.target in contract.GEMM:
            maker = graph.producer.get(step.args[0].buffer)
            if maker is not None and isinstance(graph.steps[maker], Extern):
                found.append((maker, step.name))
    return found


def paired(plan: Plan, first: str, second: str, order: dict[str, int]) -> Plan:
    """``plan`` with the two products, and whatever is in their kernels, in one in CUDA C++."""
    inside = {first, second}
    rest = []
    for group in plan.groups:
        if inside & set(group.nodes):
            inside |= set(group.nodes)
        else:
            rest.append(group)
    nodes = tuple(sorted(inside, key=lambda n: order[n]))
    return _added(Plan(tuple(rest)), Group(nodes, launch=(("language", windows.LANGUAGE),)), order)


def absorb(graph: Graph, plan: Plan, name: str, launch: tuple[tuple[str, Any], ...] = ()) -> Plan:
    """Take over one product: with its users and makers in one kernel if possible, else alone, else not at all."""
    order = {n: k for k, n in enumerate(graph.steps)}
    alone = _added(plan, Group((name,), launch=launch), order)
    if not legal(graph, alone):
        return plan
    near = list(graph.users[name])
    if (
        graph.language != windows.LANGUAGE
    ):  # there, threads bring what is computed: worth it where it is cheap
        near += [r for r in graph.steps[name].reads if r in graph.steps]
    return joined(graph, alone, name, near)


def joined(graph: Graph, plan: Plan, name: str, near: Sequence[str]) -> Plan:
    """``plan`` with those of ``near`` in the kernel of the product ``name`` that fit there."""
    order = {n: k for k, n in enumerate(graph.steps)}
    for other in near:
        for joined in _joins(graph, plan, name, other, order):
            if legal(graph, joined):
                plan = joined
                break
    return plan


def _joins(graph: Graph, plan: Plan, name: str, other: str, order: dict[str, int]) -> list[Plan]:
    """Plans in which the group of ``name`` takes in the group of ``other``, or only ``other`` and its like."""
    home = next(g for g in plan.groups if name in g.nodes)
    away = next((g for g in plan.groups if other in g.nodes and name not in g.nodes), None)
    if away is None:
        return []
    rest = Plan(tuple(g for g in plan.groups if g is not home and g is not away))
    merged = Group(
        tuple(sorted({*home.nodes, *away.nodes}, key=lambda n: order[n])),
        contraction=home.contraction,
        launch=home.launch,
    )
    called = [attend.products_of(graph, group.nodes) for group in (home, away)]
    plans = [] if all(called) else [_added(rest, merged, order)]
    pointwise = [n for n in away.nodes if isinstance(s := graph.steps[n], Node) and s.pointwise]
    for size in range(len(pointwise), 0, -1):
        taken = set(pointwise[:size]) | set(home.nodes)
        left = tuple(n for n in away.nodes if n not in taken)
        if not left:
            continue
        nodes = tuple(sorted(taken, key=lambda n: order[n]))
        part = _added(rest, Group(nodes, contraction=home.contraction, launch=home.launch), order)
        plans.append(_added(part, Group(left), order))
    return plans


def _added(plan: Plan, group: Group, order: dict[str, int]) -> Plan:
    return Plan(tuple(sorted((*plan.groups, group), key=lambda g: order[g.nodes[-1]])))
