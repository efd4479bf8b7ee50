"""Halves in buckets of their columns, with as few bounds as are worth a copy."""

import torch
import torch.nn as nn

ROWS, FEATURES, BOUNDARIES = 40, 64, 31
shapes = {"cpu": {"ROWS": 40}, "gpu": {"ROWS": 40}, "ragged": {"ROWS": 40}}


class Model(nn.Module):
    def forward(self, x, boundaries):
        return torch.searchsorted(boundaries, x.t().contiguous()).t() + 1


def get_inputs():
    boundaries = torch.randn(FEATURES, BOUNDARIES).bfloat16().sort(dim=1).values
    return [torch.randn(ROWS, FEATURES).bfloat16(), boundaries]
