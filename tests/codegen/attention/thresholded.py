"""Attention whose scores decide themselves whether they count: a score is needed twice."""

import torch
import torch.nn as nn

LENGTH = 64
shapes = {"ragged": {"LENGTH": 39}}


class Model(nn.Module):
    def forward(self, query, key, value):
        scores = query @ key.transpose(-2, -1) * 0.25
        scores = torch.where(scores > -0.3, scores, 2 * scores)
        return torch.softmax(scores, dim=-1) @ value


def get_inputs():
    return [torch.randn(2, 3, LENGTH, 16) for _ in range(3)]


def get_init_inputs():
    return []
