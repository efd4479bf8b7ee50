"""Jagged sequences of vectors padded with zeros to a dense tensor, longer ones cut."""

import torch
import torch.nn as nn

family = "ranking"
ROWS, TOTAL, LENGTH, DIM = 512, 16384, 64, 64
shapes = {
    "cpu": {"ROWS": 512, "TOTAL": 16384, "LENGTH": 64, "DIM": 64},
    "gpu": {"ROWS": 8192, "TOTAL": 1048576, "LENGTH": 256, "DIM": 128},
    "ragged": {"ROWS": 23, "TOTAL": 307, "LENGTH": 19, "DIM": 12},
}


class Model(nn.Module):
    def __init__(self, length):
        super().__init__()
        self.length = length

    def forward(self, values, offsets):
        position = torch.arange(self.length, device=values.device)
        source = offsets[:-1, None] + position
        inside = source < offsets[1:, None]
        rows = values[source.clamp(max=values.shape[0] - 1)]
        return torch.where(inside[:, :, None], rows, torch.zeros_like(rows))


def get_inputs():
    cuts = torch.randint(0, TOTAL + 1, (ROWS - 1,)).sort().values
    offsets = torch.cat([torch.tensor([0]), cuts, torch.tensor([TOTAL])])
    return [torch.randn(TOTAL, DIM), offsets]


def get_init_inputs():
    return [LENGTH]
