"""Schedule -> Triton kernel module text: the kernels, and a ``forward`` that allocates and launches."""

from __future__ import annotations

from functools import partial

from ke_gym.codegen import module
from ke_gym.codegen.graph import Graph
from ke_gym.codegen.module_gpu import functions
from ke_gym.codegen.schedule import Schedule
from ke_gym.codegen.triton_launches import printed
from ke_gym.codegen.triton_text import HELPERS


def emit(name: str, graphs: tuple[Graph, ...], schedule: Schedule) -> str:
    """The whole module as text."""
    used: set[str] = set()
    kernels, called = functions(graphs, schedule, partial(printed, used=used))
    needed, data = module.held(graphs)
    imports = [needed]
    if kernels:
        imports += ["import triton", "import triton.language as tl"]
        if "libdevice" in used:
            imports.append("from triton.language.extra import libdevice")
        if "TensorDescriptor" in used:
            imports.append("from triton.tools.tensor_descriptor import TensorDescriptor")
    helpers = [HELPERS[h] for h in sorted(used) if h in HELPERS]
    parts = [f'"""{name}, generated from its reference."""\n\n' + "\n".join(imports)]
    parts += data
    parts += [helper.rstrip() for helper in helpers]
    parts += kernels
    parts.append(called)
    return "\n\n\n".join(parts) + "\n"
