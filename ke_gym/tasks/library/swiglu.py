"""SwiGLU: the two halves of a projection, one gating the other through SiLU."""

import torch
import torch.nn as nn
import torch.nn.functional as F

family = "pointwise"
ROWS, HIDDEN = 2048, 1408
shapes = {
    "cpu": {"ROWS": 2048, "HIDDEN": 1408},
    "gpu": {"ROWS": 16384, "HIDDEN": 11008},
    "ragged": {"ROWS": 29, "HIDDEN": 173},
}


class Model(nn.Module):
    """Shazeer, "GLU Variants Improve Transformer", 2020."""

    def forward(self, x):
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up


def get_inputs():
    return [torch.randn(ROWS, 2 * HIDDEN)]
