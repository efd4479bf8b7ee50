"""Causal attention of Llama 3.1 8B (32 heads over 8 of keys and values, 128 each), written out as models do it."""

import math

import torch
import torch.nn as nn

family = "attention"
BATCH, HEADS, GROUPS, LENGTH, DIM, DTYPE = 1, 4, 2, 256, 64, torch.float32
shapes = {
    "cpu": {"LENGTH": 256},
    "gpu": {"HEADS": 32, "GROUPS": 8, "LENGTH": 4096, "DIM": 128, "DTYPE": torch.bfloat16},
}


class Model(nn.Module):
    def forward(self, query, key, value):
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
        length = query.shape[-2]
        future = torch.triu(torch.ones(length, length, dtype=torch.bool, device=query.device), diagonal=1)
        scores = scores.masked_fill(future, float("-inf"))
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        return weights @ value


def get_inputs():
    query = torch.randn(BATCH, HEADS, LENGTH, DIM, dtype=DTYPE)
    return [query, *(torch.randn(BATCH, GROUPS, LENGTH, DIM, dtype=DTYPE) for _ in range(2))]
