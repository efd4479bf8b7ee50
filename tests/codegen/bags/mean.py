"""Means of bags, one id of which counts for nothing, with 32-bit lists that end with the number of ids."""

import torch
import torch.nn as nn

TOTAL, ROWS, DIM = 61, 13, 40
shapes = {"ragged": {"TOTAL": 45}}


class Model(nn.Module):
    def __init__(self, rows, dim):
        super().__init__()
        self.table = nn.EmbeddingBag(rows, dim, mode="mean", padding_idx=3, include_last_offset=True)

    def forward(self, ids, offsets):
        return self.table(ids, offsets)


def get_inputs():
    cuts = torch.randint(0, TOTAL + 1, (9,), dtype=torch.int32).sort().values
    ends = torch.tensor([0, 0, TOTAL, TOTAL], dtype=torch.int32)
    offsets = torch.cat([ends[:2], cuts, ends[2:]])
    return [torch.randint(0, ROWS, (TOTAL,), dtype=torch.int32), offsets]


def get_init_inputs():
    return [ROWS, DIM]
