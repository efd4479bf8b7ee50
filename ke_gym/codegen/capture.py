"""Task -> graph of Core ATen operations, one per public shape set."""

from __future__ import annotations

import inspect
import io
import logging
import operator
import re
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from ke_gym.codegen.decompositions import ATTENTION, decompositions
from ke_gym.codegen.errors import CodegenError
from ke_gym.errors import UserError
from ke_gym.languages.plan import memory_order
from ke_gym.tasks.inputs import separate
from ke_gym.tasks.reference import plain_tensors

if TYPE_CHECKING:
    from ke_gym.tasks import Task

CHECK = torch.ops.aten._linalg_check_errors.default
OWN_ATTENTION = {
    "cpp": (torch.float32, torch.bfloat16, torch.float16),
    "triton": (torch.float32,),
    "cuda": (),
}
"""In which dtypes the generator's own attention takes the library's place, by language: there the library's is slow."""


@dataclass(frozen=True)
class Captured:
    """An FX graph of ATen calls. Placeholders are named by ``names`` in order, ``None`` for plain scalars.

    ``constants`` holds tensors the model makes from literals, by placeholder name. ``weights`` are the arguments that
    are state and the same in every call: none where gradients are asked for, since these change them.
    """

    graph: torch.fx.Graph
    names: tuple[str | None, ...]
    constants: dict[str, torch.Tensor]
    arguments: tuple[str, ...]
    weights: tuple[str, ...] = ()


# torch.export keeps state of the whole process (modes, caches), and so does `_quiet`.
_exporting = threading.Lock()

LARGE = 1 << 22
DRAWING = frozenset(
    (
        "normal_",
        "uniform_",
        "kaiming_normal_",
        "kaiming_uniform_",
        "xavier_normal_",
        "xavier_uniform_",
        "trunc_normal_",
    )
)
INSTEAD = (
    "a kernel written by hand can still be judged: scripts/evaluate.py --task TASK --kernel FILE runs one whose "
    "Python cannot be traced in the host lane"
)


def capture(task: Task, shape_set: str, language: str = "cpp") -> Captured:
    """The task's graph, for kernels in ``language``.

    Raises ``CodegenError`` naming the operation and source line that cannot be captured, and what to do.
    """
    with _Unfilled():
        reference = task.reference(shape_set)
    if plain_tensors(reference.module):  # which may have been drawn after others
        reference = task.reference(shape_set)
    inputs = _arguments(task, shape_set)
    try:
        with _exporting, _quiet():
            captured = (
                _joint(reference, inputs, language)
                if task.backward
                else _exported(reference, inputs, language)
            )
    except CodegenError as error:
        raise CodegenError(f"{task.name}: {error}; {INSTEAD}") from error
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        where = _user_frame(traceback.extract_tb(error.__traceback__))
        raise CodegenError(
            f"{task.name}: torch.export refused the model{where}: {reason.strip()}; {INSTEAD}"
        ) from error
    for node in captured.graph.nodes:
        if _depends_on_data(node.meta.get("val")):
            where = _user_frame(_frames(node.meta.get("stack_trace") or ""))
            raise CodegenError(
                f"{task.name}: torch.export gives the model{where} a size that depends on the data ({node.name}), "
                f"and kernels are generated for fixed sizes; {INSTEAD}"
            )
    return captured


class _Unfilled(TorchFunctionMode):
    """Large parameters are left as they were allocated: a graph holds none of their values, and drawing a table of a
    GPU's size takes as long as everything else."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get("tensor")  # torch.nn.init hands it on by name
        if (
            getattr(func, "__name__", "") in DRAWING
            and isinstance(tensor, torch.Tensor)
            and tensor.numel() >= LARGE
        ):
            return tensor
        return func(*args, **kwargs)


def _arguments(task: Task, shape_set: str) -> list[Any]:
    """Arguments for the model: tensors that nobody has filled, since nobody reads them, and at a GPU's sizes that takes
    half a minute; filled ones for a task that looks at what it draws."""
    # A copy: what a task finds out about itself under fake tensors must not be kept.
    fresh = type(task).from_bytes(task.to_bytes())
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            drawn = fresh.inputs(shape_set, seed=0, device="fake")
    except (UserError, RuntimeError):
        return task.inputs(shape_set, seed=0)
    unfilled = {
        id(value): torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
        for value in drawn
        if isinstance(value, torch.Tensor)
    }
    return [unfilled.get(id(value), value) for value in drawn]


@contextmanager
def _quiet() -> Iterator[None]:
    """``torch.export`` warns of its own internals, and prints what it then raises: neither is for the user."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _depends_on_data(value: Any) -> bool:
    leaves = torch.utils._pytree.tree_leaves(value)
    sizes = [n for leaf in leaves for n in (leaf.shape if isinstance(leaf, torch.Tensor) else (leaf,))]
    return any(isinstance(n, (torch.SymInt, torch.SymFloat, torch.SymBool)) for n in sizes)


def _frames(stack_trace: str) -> list[traceback.FrameSummary]:
    """A node's recorded stack, which is text."""
    found = re.findall(r'File "(.+?)", line (\d+), in (\S+)', stack_trace)
    return [traceback.FrameSummary(file, int(line), name) for file, line, name in found]


def _user_frame(frames: Sequence[traceback.FrameSummary]) -> str:
    """The innermost line that is the user's own, as " at FILE:LINE"."""
    own = [f for f in frames if "/torch/" not in f.filename and "ke_gym" not in f.filename]
    return f" at {own[-1].filename}:{own[-1].lineno}" if own else ""


def _originals(reference: Any) -> dict[str, str]:
    """State name of the task -> qualified name in the module."""
    module = reference.module
    return dict(zip(reference.state, (n for n, _ in [*module.named_parameters(), *module.named_buffers()])))


def _exported(reference: Any, inputs: list[Any], language: str) -> Captured:
    from torch.export.graph_signature import InputKind, OutputKind

    module = reference.module
    mangled = _mangled(reference)
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        program = torch.export.export(module, tuple(separate(inputs)), strict=False)
        table = decompositions(language)
        calls = program.graph.find_nodes(op="call_function", target=ATTENTION)
        if all(_is_plain(call, OWN_ATTENTION[language]) for call in calls):
            table[ATTENTION] = _attention
        program = program.run_decompositions(table)
    signature = program.graph_signature
    names: list[str | None] = []
    arguments: list[str] = []
    constants: dict[str, torch.Tensor] = {}
    state: list[str] = []
    position = 0
    for spec, node in zip(signature.input_specs, program.graph.find_nodes(op="placeholder")):
        if spec.kind is InputKind.USER_INPUT:
            value = node.meta.get("val")
            name = node.name if isinstance(value, torch.Tensor) else None
            while name in reference.state:  # a parameter has that name
                name = f"{name}_input"
            names.append(name)
            arguments.append(name or f"scalar{position}")
            position += 1
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            name = mangled[spec.target or ""]
            names.append(name)
            state.append(name)
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            value = program.constants[spec.target or ""]
            names.append(node.name)
            constants[node.name] = value
        elif spec.kind is InputKind.TOKEN:
            names.append(None)
        else:
            raise CodegenError(f"the model takes a {spec.kind.name.lower()} input, which no kernel can take")
    kept = [s.kind is OutputKind.USER_OUTPUT for s in signature.output_specs]
    output = program.graph.output_node()
    output.args = (tuple(a for a, keep in zip(output.args[0], kept) if keep),)
    _drop_checks(program.graph)
    state = list(dict.fromkeys(state))
    return Captured(program.graph, tuple(names), constants, (*arguments, *state), tuple(state))


def _drop_checks(graph: torch.fx.Graph) -> None:
    """Leave out the library's looks at whether a matrix could be inverted: they compute nothing, and raise for inputs that the
    reference is not proven on either."""
    for node in reversed(list(graph.nodes)):
        ordered = node.target is torch.ops.higher_order.with_effects and node.args[1] is CHECK
        if not node.users and (node.target in (CHECK, operator.getitem) or ordered):
            graph.erase_node(node)


def _mangled(reference: Any) -> dict[str, str]:
    """Qualified name in the module -> state name of the task; modules that share a tensor have a name each."""
    module = reference.module
    shared = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    held = dict(shared)
    known = {id(held[original]): name for name, original in _originals(reference).items()}
    return {original: known[id(tensor)] for original, tensor in shared}


def _is_plain(call: torch.fx.Node, dtypes: Sequence[torch.dtype]) -> bool:
    """Whether attention is computed in one of ``dtypes``, without dropout, and without a mask: where a row sees no key, the
    library gives zeros and a softmax NaN, and which NaN of hidden values spread depends on the library's blocks."""
    given = dict(zip(("attn_mask", "dropout_p", "is_causal"), call.args[3:6])) | call.kwargs
    value = call.meta.get("val")
    alone = given.get("attn_mask") is None and not given.get("dropout_p") and not given.get("is_causal")
    return alone and isinstance(value, torch.Tensor) and value.dtype in dtypes


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *_: None,
    scale: float | None = None,
    enable_gqa: bool = False,
    **__: object,
) -> torch.Tensor:
    """What torch documents ``scaled_dot_product_attention`` to be equivalent to, where it is ``_is_plain``."""
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], dim=-3) for t in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    made = torch.softmax(scores, dim=-1) @ value
    # The library's result lies in memory as its queries do, and views behind it count on that.
    order, back = memory_order(query.stride())
    return made.permute(order).contiguous().permute(back)


def _joint(reference: Any, inputs: list[Any], language: str) -> Captured:
    """Forward and backward in one graph, by tracing the reference's own autograd call."""
    table = decompositions(language)
    state = list(reference.state)
    originals = _originals(reference)
    learned = {name for name, p in reference.module.named_parameters() if p.requires_grad}

    def run(*flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = {}
        for name, tensor in zip(state, flat[len(inputs) :]):
            original = originals[name]
            values[original] = tensor.detach().requires_grad_() if original in learned else tensor
        with torch.nn.utils.stateless._reparametrize_module(reference.module, values):
            return tuple(reference(*flat[: len(inputs)]))

    flat = [*inputs, *(reference.state[n] for n in state)]
    # The libraries' own attention and recurrent layers keep what only their own backward understands.
    own = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with own, torch.backends.mkldnn.flags(enabled=False):
        traced = make_fx(run, decomposition_table=table, tracing_mode="fake")(*flat)
    if any(_writes(node) for node in traced.graph.nodes):
        pure = torch.func.functionalize(traced)
        traced = make_fx(pure, decomposition_table=table, tracing_mode="fake")(*flat)
    names = _parameter_names(reference, len(inputs)) + state
    return Captured(traced.graph, tuple(names), {}, tuple(names))


def _writes(node: torch.fx.Node) -> bool:
    """Whether a call writes to what it is given."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _parameter_names(reference: Any, count: int) -> list[str]:
    parameters = list(inspect.signature(reference.module.forward).parameters)
    names = parameters[:count]
    gradients = count - len(names)
    return names + [f"grad{i}" if gradients > 1 else "grad" for i in range(gradients)]
