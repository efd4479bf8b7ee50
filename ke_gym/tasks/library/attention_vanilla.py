"""Attention with an additive position bias, written out."""

import torch
import torch.nn as nn

family = "attention"
BATCH, HEADS, LENGTH, DIM = 2, 8, 256, 64
shapes = {
    "cpu": {"BATCH": 2, "HEADS": 8, "LENGTH": 256, "DIM": 64},
    "gpu": {"BATCH": 8, "HEADS": 16, "LENGTH": 2048, "DIM": 64},
    "ragged": {"BATCH": 2, "HEADS": 5, "LENGTH": 31, "DIM": 20},
}


class Model(nn.Module):
    def forward(self, query, key, value, bias):
        scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5 + bias
        return torch.softmax(scores, dim=-1) @ value


def get_inputs():
    query, key, value = (torch.randn(BATCH, HEADS, LENGTH, DIM) for _ in range(3))
    return [query, key, value, torch.randn(HEADS, LENGTH, LENGTH)]
