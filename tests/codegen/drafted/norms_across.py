"""Statistics of positions are summed by the programs that normalize channels, which lie across them."""

import torch
import torch.nn as nn

family = "normalization"
backward = True
ROWS, COLS = 8, 48
shapes = {"cpu": {"ROWS": 8, "COLS": 48}, "ragged": {"ROWS": 8, "COLS": 48}}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.channels = nn.BatchNorm1d(COLS)
        self.positions = nn.LayerNorm(COLS)

    def forward(self, x):
        return self.positions(self.channels(x.transpose(1, 2)).transpose(1, 2))


def get_inputs():
    return [torch.randn(2, ROWS, COLS)]
