"""Products of a few rows with each other in half precision, and of those by a matrix."""

import torch
import torch.nn as nn

BATCH, ROWS, OTHERS, DIM, RANK, SUMMED, DTYPE = 7, 24, 0, 64, 32, False, torch.float16
shapes = {"cpu": {}, "gpu": {}}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter((torch.randn(OTHERS or ROWS, max(RANK, 1)) / 8).to(DTYPE))

    def forward(self, x, *others):
        y = torch.bmm(x, (others[0] if OTHERS else x).transpose(1, 2))
        if SUMMED:
            return y.sum(dim=-1)
        return torch.relu(y @ self.matrix).flatten(1) if RANK else y


def get_inputs():
    x = torch.randn(BATCH, ROWS, DIM, dtype=DTYPE)
    return [x, torch.randn(BATCH, OTHERS, DIM, dtype=DTYPE)] if OTHERS else [x]


def get_init_inputs():
    return []
