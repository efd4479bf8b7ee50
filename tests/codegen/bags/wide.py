"""Sums of wide rows, which begin at no multiple of 16 bytes; some bags are empty."""

import torch
import torch.nn as nn

TOTAL, ROWS, DIM = 40, 11, 301
shapes = {"ragged": {"TOTAL": 33}}


class Model(nn.Module):
    def __init__(self, rows, dim):
        super().__init__()
        self.table = nn.EmbeddingBag(rows, dim, mode="sum")

    def forward(self, ids, offsets):
        return self.table(ids, offsets)


def get_inputs():
    cuts = torch.randint(0, TOTAL + 1, (5,)).sort().values
    return [torch.randint(0, ROWS, (TOTAL,)), torch.cat([torch.zeros(2, dtype=torch.int64), cuts])]


def get_init_inputs():
    return [ROWS, DIM]
