"""Weighted sums over bags of embedding rows, the bags of different lengths."""

import torch
import torch.nn as nn

family = "gather"
BAGS, TOTAL, ROWS, DIM = 8192, 262144, 50000, 128
shapes = {
    "cpu": {"BAGS": 8192, "TOTAL": 262144, "ROWS": 50000, "DIM": 128},
    "gpu": {"BAGS": 65536, "TOTAL": 2097152, "ROWS": 10000000, "DIM": 128},
    "ragged": {"BAGS": 31, "TOTAL": 409, "ROWS": 127, "DIM": 24},
}


class Model(nn.Module):
    def __init__(self, rows, dim):
        super().__init__()
        self.table = nn.EmbeddingBag(rows, dim, mode="sum")

    def forward(self, ids, offsets, weights):
        return self.table(ids, offsets, per_sample_weights=weights)


def get_inputs():
    cuts = torch.randint(0, TOTAL + 1, (BAGS - 1,)).sort().values
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), cuts])
    return [torch.randint(0, ROWS, (TOTAL,)), offsets, torch.rand(TOTAL)]


def get_init_inputs():
    return [ROWS, DIM]
