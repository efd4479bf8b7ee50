"""What a task's graph is made of, for comparing tasks: operations, structure, shapes and types.

Two references are alike if they come to the same Core ATen operations on sizes of the same magnitude, whatever their
classes and variables are called and however their authors spelled them.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

import torch

if TYPE_CHECKING:
    from ke_gym.codegen.capture import Captured

FORMAT = 1
_CONTRACTIONS = {
    "mm": "product", "addmm": "product", "mv": "product", "dot": "product", "bmm": "batched", "baddbmm": "batched",
    "convolution": "convolution", "convolution_backward": "convolution", "scaled_dot_product_attention": "attention",
}  # fmt: skip
"""Operation to what its loops are like."""
_ALONG = frozenset({"_softmax", "_log_softmax", "cumsum", "cumprod", "sort", "topk"})
"""Operations that read a whole dimension for each element of it."""
_REDUCTIONS = frozenset({
    "sum", "mean", "amax", "amin", "max", "min", "prod", "any", "all", "var", "var_mean", "std", "argmax", "argmin",
})  # fmt: skip
_MOVES = frozenset({
    "view", "reshape", "expand", "permute", "transpose", "t", "unsqueeze", "squeeze", "slice", "select", "clone",
    "alias", "detach", "_to_copy", "_unsafe_view", "as_strided", "split", "split_with_sizes", "cat", "full", "empty",
    "full_like", "arange", "scalar_tensor", "lift_fresh_copy", "_assert_tensor_metadata",
})  # fmt: skip
_ARITHMETIC = frozenset({"add", "sub", "mul", "div", "neg", "rsub"})
# What each says of how a kernel has to be written: that there is a product above all, which moves there are least.
_WEIGHTS = {
    "contracts": 4.0,
    "reduces": 3.0,
    "contraction": 1.5,
    "reduction": 1.5,
    "function": 1.5,
    "arithmetic": 0.5,
    "move": 0.1,
}


@dataclass(frozen=True)
class Features:
    """One task's graph under the contract shapes of one kind of device.

    ``operations`` counts Core ATen operations by class and name ("function:rsqrt"), ``structure`` what is reduced
    ("reduces:last": trailing dimensions, "reduces:all", "reduces:inner") and contracted ("contracts:product").
    ``sizes`` are elements: of all inputs with the state ("in"), of all outputs ("out"), and the geometric mean of
    how many are reduced to one ("reduced"), or summed per element of a product ("contracted"). ``inputs`` and
    ``outputs`` are shapes with dtypes ("float32[2048, 2048]").
    """

    operations: Mapping[str, int]
    structure: Mapping[str, int]
    sizes: Mapping[str, int]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @classmethod
    def of(cls, captured: Captured) -> Self:
        """The features of a captured graph."""
        operations: Counter[str] = Counter()
        structure: Counter[str] = Counter()
        extents: dict[str, list[int]] = {"reduced": [], "contracted": []}
        for node in captured.graph.nodes:
            name = _name(node.target) if node.op == "call_function" else ""
            if not name:
                continue
            role = _role(name)
            operations[f"{role}:{name}"] += 1
            if role == "contraction":
                structure[f"contracts:{_CONTRACTIONS[name]}"] += 1
                extents["contracted"].append(_contracted(node))
            elif role == "reduction":
                where, extent = _reduced(node, name)
                structure[f"reduces:{where}"] += 1
                extents["reduced"].append(extent)
        inputs = _tensors(captured.graph.find_nodes(op="placeholder"))
        outputs = _tensors(captured.graph.output_node().all_input_nodes)
        sizes = {
            "in": max(1, sum(tensor.numel() for tensor in inputs)),
            "out": max(1, sum(tensor.numel() for tensor in outputs)),
            **{what: _mean(found) for what, found in extents.items() if found},
        }
        return cls(
            dict(operations),
            dict(structure),
            sizes,
            tuple(_shown(tensor) for tensor in inputs),
            tuple(_shown(tensor) for tensor in outputs),
        )

    def weighted(self) -> dict[str, float]:
        """Operations and structure as one vector; depth counts by its logarithm."""
        counts = {**self.operations, **self.structure}
        return {
            name: _WEIGHTS[name.partition(":")[0]] * math.log2(1 + count) for name, count in counts.items()
        }

    @property
    def dtypes(self) -> frozenset[str]:
        """Of all inputs and outputs."""
        return frozenset(text.partition("[")[0] for text in (*self.inputs, *self.outputs))

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self | None:
        """``to_json()`` backwards; None for features of another version, which are to be computed anew."""
        data = json.loads(text)
        if data.pop("format") != FORMAT:
            return None
        return cls(**{**data, "inputs": tuple(data["inputs"]), "outputs": tuple(data["outputs"])})


def _name(target: Any) -> str:
    """ "mean" for ``aten.mean.dim``; "" for what is no operation on tensors (``getitem``)."""
    return target._schema.name.partition("::")[2] if isinstance(target, torch._ops.OpOverload) else ""


def _role(name: str) -> str:
    if name in _CONTRACTIONS:
        return "contraction"
    if name in _REDUCTIONS or name in _ALONG:
        return "reduction"
    if name in _MOVES:
        return "move"
    return "arithmetic" if name in _ARITHMETIC else "function"


def _tensors(nodes: list[torch.fx.Node]) -> list[torch.Tensor]:
    values = [node.meta.get("val") for node in nodes]
    return [value for value in values if isinstance(value, torch.Tensor)]


def _shown(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _reduced(node: torch.fx.Node, name: str) -> tuple[str, int]:
    """Where the reduced dimensions lie, and how many elements come to one."""
    (source, *_) = _tensors(node.all_input_nodes)
    rank = source.dim()
    if name in _ALONG:
        dims = [next((a for a in node.args[1:] if isinstance(a, int)), -1) % max(rank, 1)]
    else:
        given: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        listed = [given] if isinstance(given, int) else list(given or ())
        dims = sorted({int(dim) % max(rank, 1) for dim in listed}) or list(range(rank))
    where = "all" if len(dims) == rank else "inner"
    if len(dims) < rank and dims == list(range(rank - len(dims), rank)):
        where = "last"
    return where, max(1, math.prod(source.shape[dim] for dim in dims if rank))


def _contracted(node: torch.fx.Node) -> int:
    """Products per element of the result: of a matrix product exactly, of the others about."""
    shapes = [tensor.shape for tensor in _tensors(node.all_input_nodes)]
    ranked = [shape for shape in shapes if len(shape) > 1]
    if not ranked:
        return max(1, shapes[0].numel())
    if "convolution" in str(node.target) and len(ranked) > 1:
        return max(1, math.prod(ranked[1][1:]))
    return max(1, ranked[0][-1])


def _mean(sizes: list[int]) -> int:
    """The geometric mean, rounded."""
    return round(math.exp(sum(math.log(size) for size in sizes) / len(sizes)))
