"""Causal self-attention written out: scores, mask, softmax, weighted sum."""

import math

import torch
import torch.nn as nn

family = "attention"
BATCH, HEADS, LENGTH, DIM = 1, 8, 384, 64
shapes = {
    "cpu": {"BATCH": 1, "HEADS": 8, "LENGTH": 384, "DIM": 64},
    "gpu": {"BATCH": 8, "HEADS": 32, "LENGTH": 2048, "DIM": 128},
    "ragged": {"BATCH": 2, "HEADS": 3, "LENGTH": 37, "DIM": 24},
}


class Model(nn.Module):
    def forward(self, query, key, value):
        scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
        length = query.shape[-2]
        future = torch.triu(torch.ones(length, length, dtype=torch.bool, device=query.device), diagonal=1)
        scores = scores.masked_fill(future, float("-inf"))
        return torch.softmax(scores, dim=-1) @ value


def get_inputs():
    return [torch.randn(BATCH, HEADS, LENGTH, DIM) for _ in range(3)]
