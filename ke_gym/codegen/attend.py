"""Two matrix products with a softmax between them -> one call of the attention template.

Nothing is assumed about how scores are scaled, biased or masked: whatever pointwise nodes stand between the first
product and the softmax becomes a function of one strip of scores. Recognized are the softmax itself, heads that
share keys, and the causal mask (Vaswani et al., 2017), whose empty half need not be computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

from ke_gym.codegen import contract
from ke_gym.codegen import contraction as templates
from ke_gym.codegen.causality import limits
from ke_gym.codegen.contract import GEMM, STRIP, Contraction, unravel, variable
from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.expr import (
    Const,
    Expr,
    Index,
    Load,
    Op,
    Rewriter,
    Var,
    compute_dtype,
    constant,
    linear,
    of,
)
from ke_gym.codegen.graph import Extern, Graph, Node, View
from ke_gym.codegen.schedule import Group

DTYPES = ("f32", "bf16", "f16")


def products_of(graph: Graph, nodes: Sequence[str]) -> list[Extern]:
    return [s for n in nodes if isinstance(s := graph.steps[n], Extern)]


def members(graph: Graph, second: Extern) -> tuple[str, ...] | None:
    """The steps from a matrix product to ``second``, and those that only make their masks and views of operands."""
    depends = _below(graph, second.args[0].buffer)
    firsts = [n for n in depends if isinstance(s := graph.steps[n], Extern) and s.target in GEMM]
    if not firsts:
        return None
    first = firsts[-1]
    inside = {first, second.name}
    after = _above(graph, first)
    inside |= {n for n in depends if n in after and n in graph.producer}
    changed = True
    while changed:
        changed = False
        for name, step in graph.steps.items():
            if name in inside or not isinstance(step, Node) or not step.pointwise or name in graph.outputs:
                continue
            users = graph.users[name]
            copies = isinstance(step.expr, Load) or not {first, second.name} & set(users)
            if users and set(users) <= inside and copies:
                inside.add(name)
                changed = True
    return tuple(n for n in graph.steps if n in inside)


def _below(graph: Graph, buffer: str) -> list[str]:
    """The steps that ``buffer`` is made from, in order."""
    found: set[str] = set()
    pending = [buffer]
    while pending:
        step = graph.producer.get(pending.pop())
        if step is not None and step not in found:
            found.add(step)
            pending.extend(graph.steps[step].reads)
    return [n for n in graph.steps if n in found]


def _above(graph: Graph, first: str) -> set[str]:
    """The steps that are made from a step, itself among them."""
    found = {first}
    for name, step in graph.steps.items():
        if any(graph.producer.get(buffer) in found for buffer in step.reads):
            found.add(name)
    return found


class Builder(contract.Builder):
    """Builds the ``Contraction`` of a group with two products; ``Illegal`` if it is no attention."""

    def __init__(self, graph: Graph, group: Group, visible: frozenset[str]) -> None:
        self.graph, self.group, self.visible = graph, group, visible
        products = products_of(graph, group.nodes)
        if len(products) != 2 or any(p.target not in GEMM for p in products):
            raise Illegal("two matrix products make an attention")
        self.first, self.step = products
        self.product = self.step.outputs[0]
        self.nodes = {n: s for n in group.nodes if isinstance(s := graph.steps[n], Node)}
        self.vector_bytes = contract.vector_bytes()
        if any(graph.buffers[v.buffer].dtype not in DTYPES for p in products for v in p.args):
            raise Illegal("operands of this dtype")

    def build(self) -> Contraction:
        after: dict[str, Node] = {}
        made = {self.product.name}
        for name, node in self.nodes.items():
            if made & set(node.reads):
                after[name] = node
                made.add(name)
        if any(not n.pointwise for n in after.values()):
            raise Illegal("reductions follow single products only")
        self.before = {n: s for n, s in self.nodes.items() if n not in after}
        if self.visible & {*self.before, self.first.outputs[0].name}:
            raise Illegal("the scores are needed elsewhere")
        self._loops()
        score = self._score(self._weights())
        operands = self._operands(score)
        stores = self._epilogue(after)
        if not stores:
            raise Illegal("nothing is stored")
        choices = self._choices(False)
        reads = self._reads([*stores, contract.Store("", "f32", constant(0), score)], None, operands)
        writes = tuple(self.graph.buffers[s.buffer] for s in stores)
        origins = ("bmm", *(n.origin for n in self.nodes.values()))
        return Contraction(
            writes[-1].name, self.step, self.problem, choices, operands, tuple(stores), None, reads, writes,
            self.group, tuple(dict.fromkeys(origins)), self.vector_bytes, score,
        )  # fmt: skip

    def _loops(self) -> None:
        """The loops (batch, head, row, key); scores of rank 4 tell batches from heads."""
        left, right = self.first.args
        self.lead = left.shape[:-2]
        totals = [n for n in self.before.values() if n.reduction == "sum"]
        if len(totals) != 1:
            raise Illegal("no softmax between the products")
        shape = totals[0].shape
        count = math.prod(self.lead)
        batch = shape[0] if len(shape) >= 4 and math.prod(shape[:-2]) == count else 1
        self.sizes = (batch, count // max(batch, 1), left.shape[-2], right.shape[-1])
        names = ("batch", "head", "row", "at")
        self.batch, self.head, self.row, self.key = (variable(n, s) for n, s in zip(names, self.sizes))
        self.flat_head = self.batch * self.sizes[1] + self.head

    # ----------------------------------------------------------------------------------------- softmax

    def _inline(self, load: Load) -> Expr:
        node = self.before.get(load.buffer)
        if node is None or not node.pointwise:
            return load
        return Rewriter(dict(zip(node.vars, load.index)), self._inline).expr(node.expr)

    def _element(self, view: View, index: Index) -> Expr:
        """Element number ``index`` of the contiguous tensor a product reads, as an expression of what made it."""
        buffer = self.graph.buffers[view.buffer]
        if view.offset or view.stride != contract._contiguous(view.shape):
            raise Illegal("an operand is a view of what makes it")
        return self._inline(Load(view.buffer, tuple(unravel(index, buffer.shape)), buffer.dtype))

    def _weights(self) -> Expr:
        """The scores ``s``, given that the second product's left operand is softmax(s)."""
        rows, keys = self.sizes[2:]
        weights = self._element(self.step.args[0], (self.flat_head * rows + self.row) * keys + self.key)
        if not isinstance(weights, Op) or weights.name not in ("mul", "div"):
            raise Illegal("no softmax between the products")
        power, total = weights.args
        if weights.name == "mul":
            if not isinstance(total, Op) or total.name != "div" or total.args[0] != Const(1.0, total.dtype):
                raise Illegal("no softmax between the products")
            total = total.args[1]
        shifted = power.args[0] if isinstance(power, Op) and power.name == "exp" else None
        if not isinstance(shifted, Op) or shifted.name != "sub" or self._reduced(total, "sum") is not power:
            raise Illegal("no softmax between the products")
        score, top = shifted.args
        if self._reduced(top, "max") is not score:
            raise Illegal("the softmax is not relative to its maximum")
        return score

    def _reduced(self, expr: Expr, reduction: str) -> Expr | None:
        """What the reduction over the keys that ``expr`` loads is of, at the current key."""
        node = self.before.get(expr.buffer) if isinstance(expr, Load) else None
        if node is None or node.reduction != reduction or len(node.rvars) != 1:
            return None
        assert isinstance(expr, Load)
        if node.rvars[0].size != self.sizes[3]:
            return None
        binding = {**dict(zip(node.vars, expr.index)), node.rvars[0]: self.key}
        return Rewriter(binding, self._inline).expr(node.expr)

    def _score(self, score: Expr) -> Expr:
        """``score`` as a function of a strip of products ``acc[j]``."""
        product = self.first.outputs[0]
        place = (*unravel(self.flat_head, self.lead), self.row, self.key)

        def read(load: Load) -> Expr:
            if load.buffer == product.name:
                if load.index != place:
                    raise Illegal("the product is read elsewhere")
                return Load("acc", (of(STRIP),), compute_dtype(product.dtype))
            if load.buffer in self.before:
                raise Illegal("the scores need a reduction")
            return self._flat_load(load)

        found = Rewriter(load=read).expr(score)
        if found.dtype != "f32":
            raise Illegal("scores of this dtype")
        self._vectorizable(found)
        return found

    # ---------------------------------------------------------------------------------------- operands

    def _operands(self, score: Expr) -> tuple[View, ...]:
        """Views of query, key and value over (batch, head of keys, row, column); sets the problem."""
        batch, heads, rows, keys = self.sizes
        query, key = self.first.args
        value = self.step.args[1]
        d, dv = key.shape[-2], value.shape[-1]
        for group in sorted((g for g in range(1, heads + 1) if heads % g == 0), reverse=True):
            kv_heads = heads // group
            try:
                views = (
                    self._operand(query, heads, 1, (rows, d)),
                    self._operand(key, kv_heads, group, (d, keys), swap=True),
                    self._operand(value, kv_heads, group, (keys, dv)),
                )
                break
            except Illegal:
                if group == 1:
                    raise
        q, k, v = (cast(tuple[int, int, int, int], view.stride) for view in views)
        causal = rows == keys and any(ahead == 1 for ahead, _ in limits(score, self.row, self.key))
        self.problem = templates.AttentionProblem(
            batch, heads, kv_heads, rows, keys, d, dv, q, k, v, 1.0, causal
        )
        return views

    def _operand(
        self, view: View, heads: int, group: int, sizes: tuple[int, int], swap: bool = False
    ) -> View:
        """``view`` with strides over (batch, head, ...); each head must hold for ``group`` heads of the product."""
        head, member = variable("head", heads), variable("member", group)
        row, col = variable("row", sizes[0]), variable("col", sizes[1])
        place = unravel(self.batch * (heads * group) + head * group + member, view.shape[:-2])
        flat = constant(view.offset)
        for i, stride in zip((*place, row, col), view.stride):
            flat = flat + i * stride
        buffer = view.buffer
        if buffer in self.before:
            shape = self.graph.buffers[buffer].shape
            found = self._inline(Load(buffer, tuple(unravel(flat, shape)), self.graph.buffers[buffer].dtype))
            if not isinstance(found, Load) or found.buffer in self.before:
                raise Illegal("an operand is computed")
            buffer = found.buffer
            flat = linear(
                0, [t for i, s in zip(found.index, self.graph.buffers[buffer].stride) for t in (i * s).terms]
            )
            flat = flat + sum(i.const * s for i, s in zip(found.index, self.graph.buffers[buffer].stride))
        if any(not isinstance(a, Var) or a.name == "member" or c < 0 for a, c in flat.terms):
            raise Illegal("an operand has no strides")
        strides = [next((c for a, c in flat.terms if of(a) == i), 0) for i in (self.batch, head, row, col)]
        if swap:
            strides[2:] = strides[:1:-1]
            sizes = sizes[::-1]
        return View(buffer, (self.sizes[0], heads, *sizes), tuple(strides), flat.const)

    def _place(self) -> tuple[Index, ...]:
        return (*unravel(self.flat_head, self.lead), self.row, variable("at", self.step.args[1].shape[-1]))
