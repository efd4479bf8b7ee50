"""A convolution along one axis in half precision, with what follows it."""

import torch
import torch.nn as nn

BATCH, INPUTS, OUTPUTS, LENGTH, TAPS, PADDING, DILATION = 5, 24, 40, 56, 3, 1, 1
BIAS, RESIDUAL, SUMMED, DTYPE = True, False, False, torch.float16
shapes = {"cpu": {}, "gpu": {}}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(
            INPUTS, OUTPUTS, TAPS, padding=PADDING, dilation=DILATION, bias=BIAS, dtype=DTYPE
        )

    def forward(self, x, *others):
        y = self.conv(x)
        if SUMMED:
            return y.sum(dim=-1)
        return torch.relu(y) + others[0] if RESIDUAL else y


def get_inputs():
    x = torch.randn(BATCH, INPUTS, LENGTH, dtype=DTYPE)
    after = LENGTH + 2 * PADDING - (TAPS - 1) * DILATION
    return [x, torch.randn(BATCH, OUTPUTS, after, dtype=DTYPE)] if RESIDUAL else [x]


def get_init_inputs():
    return []
