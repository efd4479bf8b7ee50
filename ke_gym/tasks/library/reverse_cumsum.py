"""Masked cumulative sum from the end of each row (returns to go)."""

import torch
import torch.nn as nn

family = "scan"
ROWS, COLS = 2048, 1024
shapes = {
    "cpu": {"ROWS": 2048, "COLS": 1024},
    "gpu": {"ROWS": 16384, "COLS": 16384},
    "ragged": {"ROWS": 101, "COLS": 257},
}


class Model(nn.Module):
    def forward(self, rewards, alive):
        kept = torch.where(alive, rewards, torch.zeros_like(rewards))
        return torch.flip(torch.cumsum(torch.flip(kept, dims=[1]), dim=1), dims=[1])


def get_inputs():
    return [torch.randn(ROWS, COLS), torch.rand(ROWS, COLS) < 0.8]
