"""Attention in half precision, heads side by side in memory, as models write it out."""

import torch
import torch.nn as nn

BATCH, HEADS, GROUPS, ROWS, KEYS, DIM, VALUES = 1, 2, 1, 160, 160, 64, 64
CAUSAL, MASK, SPOILT, DTYPE = False, "", False, torch.bfloat16
shapes = {"cpu": {}, "gpu": {}}


class Model(nn.Module):
    def forward(self, query, key, value, *mask):
        query, key, value = (
            t.view(BATCH, t.shape[1], -1, size).transpose(1, 2)
            for t, size in ((query, DIM), (key, DIM), (value, VALUES))
        )
        key, value = (t.repeat_interleave(HEADS // GROUPS, dim=1) for t in (key, value))
        scores = query @ key.transpose(-2, -1) * DIM**-0.5
        if CAUSAL:
            future = torch.ones(ROWS, KEYS, dtype=torch.bool, device=query.device).triu(1 + KEYS - ROWS)
            scores = scores.masked_fill(future, float("-inf"))
        if MASK == "added":
            scores = scores + mask[0]
        elif MASK == "slopes":  # Press et al., "Train Short, Test Long", 2022
            at = torch.arange(KEYS, device=query.device)
            slopes = 0.5 ** (1.0 + torch.arange(HEADS, device=query.device))
            scores = scores.float() + slopes[:, None, None] * (at - at[:ROWS, None]).float()
        elif MASK == "kept":
            scores = torch.where(mask[0], scores, float("-inf"))
        elif MASK == "lengths":
            empty = torch.arange(KEYS, device=query.device) >= mask[0][:, None, None, None]
            scores = scores.masked_fill(empty, float("-inf"))
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ value


def get_inputs():
    query = torch.randn(BATCH, ROWS, HEADS * DIM).to(DTYPE)
    key = torch.randn(BATCH, KEYS, GROUPS * DIM).to(DTYPE)
    value = torch.randn(BATCH, KEYS, GROUPS * VALUES).to(DTYPE)
    if SPOILT:
        value[:, -1, 3], value[:, -5, 40] = float("inf"), float("nan")
    masks = {
        "added": lambda: torch.randn(HEADS, ROWS, KEYS).to(DTYPE),
        "kept": lambda: torch.rand(BATCH, 1, ROWS, KEYS) < 0.8,
        "lengths": lambda: torch.randint(1, KEYS + 1, (BATCH,)),
    }
    return [query, key, value, *([masks[MASK]()] if MASK in masks else [])]


def get_init_inputs():
    return []
