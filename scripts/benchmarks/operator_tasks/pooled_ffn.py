"""Sequences mean-pooled under a mask, then a residual feed-forward network (InterFormer's PFFN)."""

import torch
import torch.nn as nn
import torch.nn.functional as F

family = "ranking"
BATCH, LENGTH, DIM, HIDDEN, DTYPE = 64, 128, 128, 256, torch.float32
shapes = {
    "cpu": {"LENGTH": 128},
    "gpu": {"LENGTH": 512, "DIM": 256, "HIDDEN": 1024, "DTYPE": torch.float16},
}


class Model(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.up = nn.Linear(dim, hidden, dtype=DTYPE)
        self.down = nn.Linear(hidden, dim, dtype=DTYPE)

    def forward(self, sequence, mask):
        weight = mask.to(sequence.dtype)[:, :, None]
        pooled = (sequence * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
        return pooled + self.down(F.gelu(self.up(pooled)))


def get_inputs():
    lengths = torch.randint(0, LENGTH + 1, (BATCH, 1))
    return [torch.randn(BATCH, LENGTH, DIM, dtype=DTYPE), torch.arange(LENGTH) < lengths]


def get_init_inputs():
    return [DIM, HIDDEN]
