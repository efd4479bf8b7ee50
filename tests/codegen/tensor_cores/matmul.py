"""A product of matrices, with what follows it; operands as they are, or transposed in memory."""

import torch
import torch.nn as nn
from torch.nn.functional import gelu, linear

BATCH, ROWS, COLUMNS, DEPTH, PART, LEFT, RIGHT = 0, 200, 168, 96, 0, False, True
BEFORE, AFTER, DTYPE = False, "", torch.float16
shapes = {"cpu": {}, "gpu": {}}


class Model(nn.Module):
    def forward(self, a, b, c, d):
        a, b = (a[..., PART:], b[..., PART:]) if PART else (a, b)
        a = a.transpose(-1, -2) if LEFT else a
        a = torch.nn.functional.silu(a) if BEFORE else a
        if AFTER == "linear":
            return gelu(linear(a, b, c))
        y = a @ (b.transpose(-1, -2) if RIGHT else b)
        if AFTER == "residual":
            return torch.relu(y * 0.5 + c) + d
        if AFTER == "two":
            return y, torch.sigmoid(y).float() * d
        return y


def get_inputs():
    batch = [BATCH] if BATCH else []
    left = batch + ([DEPTH, ROWS] if LEFT else [ROWS, DEPTH])
    right = batch + ([COLUMNS, DEPTH] if RIGHT else [DEPTH, COLUMNS])
    after = [COLUMNS], [*batch, ROWS, COLUMNS]
    return [torch.randn(*size, dtype=DTYPE) for size in (left, right, *after)]


def get_init_inputs():
    return []
