"""Padded sequences of vectors packed into jagged form; zeros where a row is too long."""

import torch
import torch.nn as nn

family = "ranking"
ROWS, TOTAL, LENGTH, DIM = 1024, 32768, 64, 64
shapes = {
    "cpu": {"ROWS": 1024, "TOTAL": 32768, "LENGTH": 64, "DIM": 64},
    "gpu": {"ROWS": 8192, "TOTAL": 1048576, "LENGTH": 256, "DIM": 128},
    "ragged": {"ROWS": 29, "TOTAL": 311, "LENGTH": 17, "DIM": 12},
}


class Model(nn.Module):
    def __init__(self, total):
        super().__init__()
        self.total = total

    def forward(self, dense, offsets):
        slots = torch.arange(self.total, device=dense.device)
        row = torch.searchsorted(offsets, slots, right=True) - 1
        position = slots - offsets[row]
        inside = position < dense.shape[1]
        values = dense[row, position.clamp(max=dense.shape[1] - 1)]
        return torch.where(inside[:, None], values, torch.zeros_like(values))


def get_inputs():
    cuts = torch.randint(0, TOTAL + 1, (ROWS - 1,)).sort().values
    offsets = torch.cat([torch.tensor([0]), cuts, torch.tensor([TOTAL])])
    return [torch.randn(ROWS, LENGTH, DIM), offsets]


def get_init_inputs():
    return [TOTAL]
