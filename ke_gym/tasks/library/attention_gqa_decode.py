"""One decoding step of grouped-query attention over a padded key-value cache."""

import math

import torch
import torch.nn as nn

family = "attention"
BATCH, HEADS, KV_HEADS, LENGTH, DIM = 8, 16, 4, 512, 64
shapes = {
    "cpu": {"BATCH": 8, "HEADS": 16, "KV_HEADS": 4, "LENGTH": 512, "DIM": 64},
    "gpu": {"BATCH": 64, "HEADS": 32, "KV_HEADS": 8, "LENGTH": 8192, "DIM": 128},
    "ragged": {"BATCH": 3, "HEADS": 6, "KV_HEADS": 2, "LENGTH": 43, "DIM": 24},
}


class Model(nn.Module):
    """Ainslie et al., "GQA", 2023."""

    def forward(self, query, keys, values, lengths):
        groups = query.shape[1] // keys.shape[1]
        keys = keys.repeat_interleave(groups, dim=1)
        values = values.repeat_interleave(groups, dim=1)
        scores = query @ keys.transpose(-2, -1) / math.sqrt(query.shape[-1])
        position = torch.arange(keys.shape[2], device=keys.device)
        empty = position >= lengths[:, None, None, None]
        scores = scores.masked_fill(empty, float("-inf"))
        return torch.softmax(scores, dim=-1) @ values


def get_inputs():
    query = torch.randn(BATCH, HEADS, 1, DIM)
    keys, values = torch.randn(2, BATCH, KV_HEADS, LENGTH, DIM)
    return [query, keys, values, torch.randint(1, LENGTH + 1, (BATCH,))]
