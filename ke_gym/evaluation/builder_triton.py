"""``builder.serve`` in a process forked after Triton was imported: half a second less a build."""

import triton.compiler.code_generator  # noqa: F401
from triton.runtime.cache import triton_key

from ke_gym.evaluation.builder import serve

__all__ = ["serve"]

triton_key()  # a hash of the whole installation, which is kept: every build would compute it anew
