"""Sequences mean-pooled under a mask, then a residual feed-forward network (InterFormer)."""

import torch
import torch.nn as nn
import torch.nn.functional as F

family = "ranking"
BATCH, LENGTH, DIM, HIDDEN = 256, 128, 128, 256
shapes = {
    "cpu": {"BATCH": 256, "LENGTH": 128, "DIM": 128, "HIDDEN": 256},
    "gpu": {"BATCH": 2048, "LENGTH": 512, "DIM": 256, "HIDDEN": 1024},
    "ragged": {"BATCH": 7, "LENGTH": 29, "DIM": 37, "HIDDEN": 53},
}


class Model(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, sequence, mask):
        weight = mask.to(sequence.dtype)[:, :, None]
        pooled = (sequence * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
        return pooled + self.down(F.gelu(self.up(pooled)))


def get_inputs():
    lengths = torch.randint(0, LENGTH + 1, (BATCH, 1))
    return [torch.randn(BATCH, LENGTH, DIM), torch.arange(LENGTH) < lengths]


def get_init_inputs():
    return [DIM, HIDDEN]
