"""FX graph of Core ATen operations -> ``Graph`` of loop-nest nodes.

Every operation has a rule registered under its overload name in one of the ``ops_*`` modules. A rule returns
tensors as functions of their index; operations that compute something register a ``Node``. Whatever has no
rule becomes a library call (``Extern``), so every graph lowers.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensor

from ke_gym.codegen.capture import Captured
from ke_gym.codegen.errors import CodegenError, Illegal
from ke_gym.codegen.expr import (
    Const,
    Expr,
    Index,
    Load,
    Var,
    cast,
    constant,
    linear,
    of,
)
from ke_gym.codegen.graph import Buffer, Extern, Graph, Node, Precision, Tensor, View, contiguous_stride
from ke_gym.codegen.reserved import LOCAL, RESERVED
from ke_gym.codegen.tensors import (
    element,
    full,
    normal_dims,
    squeeze,
    variables_of,
)

TORCH_DTYPES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.bool: "bool",
}

# Tensors that only library calls make and read: no loop computes with their elements.
OPAQUE = {torch.complex64: "c64", torch.complex128: "c128"}
_TORCH_DTYPES = {name: dtype for dtype, name in (TORCH_DTYPES | OPAQUE).items()}

Rule = Callable[..., Any]
RuleT = TypeVar("RuleT", bound=Rule)
RULES: dict[str, Rule] = {}

MAX_CONSTANT = 16 << 20  # bytes; as text, it must fit into the header of an artifact


def rule(*names: str) -> Callable[[RuleT], RuleT]:
    def register(function: RuleT) -> RuleT:
        for name in names:
            RULES[f"aten.{name}"] = function
        return function

    return register


def dtype_name(dtype: torch.dtype) -> str:
    if dtype not in TORCH_DTYPES:
        raise Illegal(f"no loops over {dtype}")
    return TORCH_DTYPES[dtype]


def stored_dtype(dtype: torch.dtype) -> str:
    return OPAQUE.get(dtype) or dtype_name(dtype)


def _opaque(arguments: Any) -> bool:
    leaves = torch.utils._pytree.tree_leaves(arguments)
    return any(isinstance(leaf, Tensor) and leaf.dtype in OPAQUE.values() for leaf in leaves)


class Lowering:
    """State of one lowering: the graph so far, and the tensor each FX node stands for."""

    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self.graph = Graph({}, captured.arguments)
        self.values: dict[torch.fx.Node, Any] = {}
        self.taken: set[str] = set(captured.arguments) | RESERVED
        for name in captured.arguments:
            if name in RESERVED or LOCAL.fullmatch(name):
                self.graph.renamed[name] = self.fresh(f"{name}_given")
        self.graph.weights = frozenset(self.graph.renamed.get(name, name) for name in captured.weights)
        self.current: torch.fx.Node | None = None
        self.origin = ""

    # ----------------------------------------------------------------------------------------- driving

    def run(self) -> Graph:
        placeholders = [n for n in self.captured.graph.nodes if n.op == "placeholder"]
        for node, name in zip(placeholders, self.captured.names):
            self.values[node] = self._placeholder(node, name and self.graph.renamed.get(name, name))
        for node in self.captured.graph.nodes:
            if node.op == "get_attr":
                self.values[node] = self._attribute(node)
            elif node.op == "call_function":
                self.current = node
                self.origin = _origin(node)
                self.values[node] = self._call(node)
            elif node.op == "output":
                flat = torch.utils._pytree.tree_leaves(node.args[0])
                outputs = [self._output(i, a) for i, a in enumerate(flat) if a is not None]
                self.graph.outputs = tuple(outputs)
        self.graph.prune()
        return self.graph

    def _placeholder(self, node: torch.fx.Node, name: str | None) -> Any:
        value: Any = node.meta.get("val")
        if name is None:
            return value
        if name in self.captured.constants:
            value = self.captured.constants[name]
            value = value.detach().resolve_conj().contiguous()
            if value.nbytes > MAX_CONSTANT:
                raise CodegenError(
                    f"the model holds a tensor of {value.nbytes} bytes that is neither parameter nor buffer; "
                    "register it as a buffer"
                )
            self.graph.constants[name] = value
        return self._stored(name, value)

    def _attribute(self, node: torch.fx.Node) -> Tensor:
        module = node.graph.owning_module
        value = module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        name = self.fresh(node.name)
        self.captured.constants[name] = value  # type: ignore[assignment]
        return self._placeholder(node, name)  # type: ignore[no-any-return]

    def _stored(self, name: str, value: torch.Tensor) -> Tensor:
        shape = tuple(int(n) for n in value.shape)
        buffer = Buffer(name, shape, tuple(int(s) for s in value.stride()), stored_dtype(value.dtype))
        self.graph.inputs[name] = buffer
        return self.tensor_of(buffer)

    def tensor_of(self, buffer: Buffer) -> Tensor:
        return Tensor(buffer.shape, buffer.dtype, lambda index: Load(buffer.name, index, buffer.dtype))

    def _output(self, position: int, arg: Any) -> str:
        value = self.values[arg] if isinstance(arg, torch.fx.Node) else arg
        if not isinstance(value, Tensor):
            value = full((), "f32" if isinstance(value, float) else "i64", value)
        if value.dtype in OPAQUE.values():
            value = self._cloned(value)
        name = self._whole_buffer(value)
        if name is None or name not in self.graph.producer or name in self.graph.outputs:
            # A view, a constant, or an input returned as it is: outputs are fresh tensors.
            self.origin = "copy"
            name = self._buffer_of(self.realize(value, f"out{position}"))
        self.graph.outputs = (*self.graph.outputs, name)
        self.graph.shapes[name] = value.shape
        self.graph.memo.clear()
        return name

    def _cloned(self, tensor: Tensor) -> Tensor:
        """A fresh contiguous tensor of a dtype that no loop copies."""
        dtype = next(d for d, name in OPAQUE.items() if name == tensor.dtype)
        result = torch.empty(tensor.shape, dtype=dtype, device="meta")
        made: Tensor = self.extern(
            "aten.clone.default", (tensor,), {"memory_format": torch.contiguous_format}, result
        )
        return made

    def _whole_buffer(self, tensor: Tensor) -> str | None:
        """The computed buffer that holds exactly these elements in order, perhaps under another shape."""
        view = self.view_of(tensor)
        if view is None or view.offset or view.stride != contiguous_stride(view.shape):
            return None
        buffer = self.graph.buffers[view.buffer]
        whole = buffer.numel == math.prod(view.shape) and buffer.stride == contiguous_stride(buffer.shape)
        return view.buffer if whole else None

    def _buffer_of(self, tensor: Tensor) -> str:
        load = tensor.at(tuple(constant(0) for _ in tensor.shape))
        assert isinstance(load, Load)
        return load.buffer

    # ------------------------------------------------------------------------------------------- calls

    def _call(self, node: torch.fx.Node) -> Any:
        if node.target is operator.getitem:
            source, position = node.args
            return self.values[source][position]  # type: ignore[index]
        target = str(node.target)
        if "val" not in node.meta:
            return None  # an assertion about metadata
        lower = RULES.get(target)
        args, kwargs = self._resolve((node.args, node.kwargs))
        if lower is not None and not _opaque((args, kwargs)):
            steps = set(self.graph.steps)
            try:
                return lower(self, *args, **kwargs)
            except Illegal:
                for name in set(self.graph.steps) - steps:  # what the rule had begun
                    del self.graph.steps[name]
        return self._extern(node, target, args, kwargs)

    def _resolve(self, arg: Any) -> Any:
        if isinstance(arg, torch.fx.Node):
            return self.values[arg]
        if isinstance(arg, (list, tuple)):
            return tuple(self._resolve(a) for a in arg)
        if isinstance(arg, dict):
            return {k: self._resolve(v) for k, v in arg.items()}
        return arg

    def _extern(self, node: torch.fx.Node, target: str, args: Any, kwargs: Any) -> Any:
        if not isinstance(node.target, torch._ops.OpOverload):
            raise CodegenError(f"the model calls {target}, which is no ATen operation")
        result = node.meta["val"]
        return self.extern(target, args, kwargs, result)

    def extern(self, target: str, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Any:
        """Call ``target``; ``result`` (fake tensors) says what comes back."""
        if not isinstance(result, (torch.Tensor, list, tuple)):
            raise CodegenError(
                f"the model needs the value of {target} on the host, which depends on data; "
                "keep such values in tensors"
            )
        several = isinstance(result, (list, tuple))
        arguments = tuple(self.argument(a) for a in args)
        keywords = tuple((k, self.argument(v)) for k, v in kwargs.items())
        fakes = self._laid(target, arguments, keywords, list(result) if several else [result])
        base = self.title()
        buffers = []
        for i, fake in enumerate(fakes):
            name = self.fresh(f"{base}_{i}" if several else base)
            if fake is None:
                buffers.append(Buffer(name, (), (), "f32"))
                continue
            if not isinstance(fake, torch.Tensor) or fake.dtype not in (*TORCH_DTYPES, *OPAQUE):
                raise CodegenError(f"the model calls {target}, whose result no kernel can take")
            shape = tuple(int(n) for n in fake.shape)
            stride = tuple(int(s) for s in fake.stride())
            buffers.append(Buffer(name, shape, stride, stored_dtype(fake.dtype)))
        name = buffers[0].name
        self.graph.steps[name] = Extern(name, target, arguments, keywords, tuple(buffers))
        self.graph.memo.clear()
        tensors = [self.tensor_of(b) for b in buffers]
        return tuple(tensors) if several else tensors[0]

    def _laid(
        self, target: str, arguments: tuple[Any, ...], keywords: tuple[tuple[str, Any], ...], fakes: list[Any]
    ) -> list[Any]:
        """The call's results as they lie in memory: many calls follow their arguments, and buffers here are contiguous,
        whatever the captured tensors were."""
        like = next((fake for fake in fakes if isinstance(fake, FakeTensor)), None)
        if like is None:
            return fakes

        def fake_of(arg: Any) -> Any:
            if isinstance(arg, tuple):
                return [fake_of(each) for each in arg]
            if not isinstance(arg, View):
                return arg
            dtype = _TORCH_DTYPES[self.graph.buffers[arg.buffer].dtype]
            return torch.empty_strided(arg.shape, arg.stride, dtype=dtype, device=like.device)

        with like.fake_mode:
            call = operator.attrgetter(target)(torch.ops)
            made = call(*map(fake_of, arguments), **{name: fake_of(value) for name, value in keywords})
        return list(made) if isinstance(made, (list, tuple)) else [made]

    def argument(self, arg: Any) -> Any:
        """``arg`` as a library call takes it: tensors become strided views, copied only where they are none."""
        if isinstance(arg, Tensor):
            return self.view_of(arg) or self.view_of(self.realize(arg, f"{self.title()}_in"))
        if isinstance(arg, (list, tuple)):
            return tuple(self.argument(a) for a in arg)
        return arg

    def given(self, tensor: Tensor) -> bool:
        """Whether the elements lie in memory before any loop runs: an input, a parameter, a constant."""
        view = self.view_of(tensor)
        return view is not None and view.buffer not in self.graph.producer

    def view_of(self, tensor: Tensor) -> View | None:
        index = tuple(of(Var(f"d{k}", n)) if n != 1 else constant(0) for k, n in enumerate(tensor.shape))
        load = tensor.at(index)
        if not isinstance(load, Load) or load.dtype != tensor.dtype:
            return None
        self.graph.memo.clear()
        buffer = self.graph.buffers[load.buffer]
        flat = linear(0, [t for i, s in zip(load.index, buffer.stride) for t in (i * s).terms])
        offset = sum(i.const * s for i, s in zip(load.index, buffer.stride))
        if any(type(atom) is not Var or c < 0 for atom, c in flat.terms):
            return None
        natural = contiguous_stride(tensor.shape)
        stride = [
            flat.coefficient(Var(f"d{k}", n)) if n != 1 else natural[k] for k, n in enumerate(tensor.shape)
        ]
        return View(load.buffer, tensor.shape, tuple(stride), offset)

    # ------------------------------------------------------------------------------- what rules build with

    def title(self) -> str:
        """The name of the operation being lowered, for what it computes."""
        assert self.current is not None
        return self.current.name

    def fresh(self, wanted: str) -> str:
        name = re.sub(r"\W", "_", wanted).lstrip("_")
        name = f"t_{name}" if not name or name[0].isdigit() else name
        chosen, number = name, 2
        while chosen in self.taken or chosen.endswith("_"):
            chosen, number = f"{name}{number}" if not name.endswith("_") else f"{name}v{number}", number + 1
        self.taken.add(chosen)
        return chosen

    def compute(
        self, shape: Sequence[int], dtype: str, value: Callable[[tuple[Index, ...]], Expr], suffix: str = ""
    ) -> Tensor:
        """A pointwise node over ``shape``."""
        shape = tuple(shape)
        variables, index = variables_of(shape)
        expr = cast(value(index), dtype)
        return self._add(Node(self._node_name(suffix), shape, dtype, variables, expr, self.origin))

    def reduce(
        self,
        source: Tensor,
        dims: Sequence[int],
        op: str,
        value: Callable[[Expr, tuple[Index, ...]], Expr],
        dtype: str,
        suffix: str = "",
        keepdim: bool = True,
    ) -> Tensor:
        """``op`` over ``dims`` of ``value(element, index)``; the result keeps reduced dims as 1 if ``keepdim``."""
        dims = normal_dims(dims, len(source.shape))
        kept = tuple(1 if d in dims else n for d, n in enumerate(source.shape))
        variables, index = variables_of(kept)
        rvars = tuple(Var(f"r{d}", source.shape[d]) for d in dims)
        full_index = tuple(of(rvars[dims.index(d)]) if d in dims else i for d, i in enumerate(index))
        expr = cast(value(element(source, full_index), full_index), dtype)
        live = tuple(r for r in rvars if r.size != 1)
        if any(r.size == 0 for r in rvars):
            identity = {"sum": 0, "prod": 1, "any": False, "all": True}.get(op)
            if identity is None:
                raise Illegal("reduction over nothing")
            result = self.compute(kept, dtype, lambda _: cast(Const(identity, "i64"), dtype), suffix)
        elif not live:
            result = self.compute(kept, dtype, lambda i: value(element(source, i), i), suffix)
        else:
            zero = {r: constant(0) for r in rvars if r.size == 1}
            from ke_gym.codegen.expr import Rewriter

            expr = Rewriter(zero).expr(expr)
            name = self._node_name(suffix)
            result = self._add(Node(name, kept, dtype, variables, expr, self.origin, op, live))
        return result if keepdim else squeeze(result, dims)

    def scan(self, source: Tensor, dim: int, op: str, dtype: str) -> Tensor:
        (dim,) = normal_dims((dim,), max(len(source.shape), 1))
        if source.shape == () or source.shape[dim] <= 1:
            return self.compute(source.shape, dtype, lambda i: element(source, i))
        variables, index = variables_of(source.shape)
        expr = cast(element(source, index), dtype)
        name = self._node_name("")
        return self._add(Node(name, source.shape, dtype, variables, expr, self.origin, op, (), dim))

    def realize(self, tensor: Tensor, name: str) -> Tensor:
        """Store ``tensor`` as a contiguous buffer of its own."""
        variables, index = variables_of(tensor.shape)
        expr = cast(tensor.at(index), tensor.dtype)
        return self._add(Node(self.fresh(name), tensor.shape, tensor.dtype, variables, expr, self.origin))

    def _add(self, node: Node) -> Tensor:
        self.graph.steps[node.name] = node
        self.graph.memo.clear()
        return Tensor(node.shape, node.dtype, lambda index: Load(node.name, index, node.dtype))

    def _node_name(self, suffix: str) -> str:
        base = self.title()
        return self.fresh(f"{base}_{suffix}" if suffix else base)

    def result(self, position: int | None = None) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of what the current operation returns."""
        assert self.current is not None
        value = self.current.meta["val"]
        value = value if position is None else value[position]
        return tuple(int(n) for n in value.shape), dtype_name(value.dtype)


# ----------------------------------------------------------------------------------------------- helpers


def _origin(node: torch.fx.Node) -> str:
    """The function in the reference that the operation came from."""
    target = node.meta.get("original_aten") or node.target
    name = getattr(target, "_opname", None) or str(target).split(".")[1 if "." in str(target) else 0]
    return str(name).lstrip("_")


def lower(captured: Captured, precision: Precision = "strict") -> Graph:
    from ke_gym.codegen import (  # noqa: F401
        ops_contract,
        ops_index,
        ops_pointwise,
        ops_reduce,
        ops_scatter,
        ops_views,
        ops_window,
    )

    graph = Lowering(captured).run()
    graph.precision = precision
    return graph
