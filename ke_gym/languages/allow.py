"""Which ATen operators a plan may call."""

from __future__ import annotations

import functools
import re

import torch

# Files, storages and raw memory (executors know the two forms of as_strided that only read); tensors whose contents are
# whatever lay there; values that leave the device.
_REFUSED = re.compile(
    r"^(as_strided_(?!copy$)\w*|from_file|set_|set_data|_?resize\w*|resize_as_\w*|\w*storage\w*|record_stream|_pin_memory|pin_memory"
    r"|is_pinned|_local_scalar_dense|item|equal|is_nonzero|empty\w*|new_empty\w*|_empty\w*|_cuda_\w*"
    r"|_debug\w*|_print|_assert\w*|_version|retain_grad|requires_grad_|output_nr|data"
    r"|_backward|_fw_primal|_make_dual|_test\w*|_nested\w*|_sparse\w*|sparse_\w*|_coalesce\w*)$"
)


@functools.cache
def draws(target: str) -> bool:
    """Whether an overload that plans may call draws random numbers, anew in every call."""
    namespace, name, overload = target.split(".")
    found = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    return torch.Tag.nondeterministic_seeded in found.tags


@functools.cache
def refusal(target: str) -> str:
    """Why a plan may not call this overload ("aten.mm.default"), or "". Unknown names are refused."""
    parts = target.split(".")
    if len(parts) != 3 or parts[0] not in ("aten", "prims"):
        return f"operator {target} is outside the namespaces aten and prims"
    namespace, name, overload = parts
    if _REFUSED.match(name):
        return f"operator {target} is not allowed in a kernel module"
    found = getattr(getattr(torch.ops, namespace), name, None)
    if found is None or overload not in found.overloads():
        return f"operator {target} does not exist in torch {torch.__version__}"
    return ""
