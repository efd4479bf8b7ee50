"""Schedule -> Triton kernel module text: the kernels, and a ``forward`` that allocates and launches.

Groups that ask for it become kernels in CUDA C++ beside the others (``windows``, ``pairs``, ``matmuls``,
``attentions``, ``searches``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ke_gym.codegen import module, module_cuda
from ke_gym.codegen.attentions import Attention
from ke_gym.codegen.graph import Graph
from ke_gym.codegen.matmuls import Matmul
from ke_gym.codegen.module_gpu import Printed, functions
from ke_gym.codegen.pairs import Pairs
from ke_gym.codegen.schedule import Schedule
from ke_gym.codegen.searches import Searched
from ke_gym.codegen.triton_launches import printed
from ke_gym.codegen.triton_text import HELPERS
from ke_gym.codegen.windows import Windowed


def emit(name: str, graphs: tuple[Graph, ...], schedule: Schedule) -> str:
    """The whole module as text."""
    used: set[str] = set()
    others: list[str] = []
    used_there: set[str] = set()

    def kernel(nest: Any, suffix: str, ready: frozenset[str]) -> Printed:
        if not isinstance(nest, (Attention, Matmul, Pairs, Searched, Windowed)):
            return printed(nest, suffix, ready, used)
        made = module_cuda.kernel(nest, suffix, used_there)
        others.append(made.text)
        return replace(made, text="")

    texts, called = functions(graphs, schedule, kernel)
    kernels = [text for text in texts if text]
    needed, data = module.held(graphs)
    imports = [needed]
    if kernels:
        imports += ["import triton", "import triton.language as tl"]
        if "libdevice" in used:
            imports.append("from triton.language.extra import libdevice")
        if "TensorDescriptor" in used:
            imports.append("from triton.tools.tensor_descriptor import TensorDescriptor")
    if others:
        imports += ["", "from ke_gym import lang"]
    helpers = [HELPERS[h] for h in sorted(used) if h in HELPERS]
    parts = [f'"""{name}, generated from its reference."""\n\n' + "\n".join(imports)]
    parts += [module_cuda.library(others, used_there)] if others else []
    parts += data
    parts += [helper.rstrip() for helper in helpers]
    parts += kernels
    parts.append(called)
    return "\n\n\n".join(parts) + "\n"
