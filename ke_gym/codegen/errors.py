"""What code generation refuses."""

from __future__ import annotations

from ke_gym.errors import UserError


class CodegenError(UserError):
    """The reference cannot be captured as a graph: says what ``torch.export`` refused and where."""


class Illegal(Exception):
    """A schedule that cannot be built for this graph. Internal: rewrites turn it into "not applicable"."""
