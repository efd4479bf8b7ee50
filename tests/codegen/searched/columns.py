"""Each of 40 columns is searched for in a row of its own; what is found is used twice, and rows are ragged."""

import torch
import torch.nn as nn

ROWS, FEATURES, BOUNDARIES = 67, 40, 50
shapes = {"cpu": {"ROWS": 67}, "gpu": {"ROWS": 67}, "ragged": {"ROWS": 67}}


class Model(nn.Module):
    def forward(self, x, boundaries):
        found = torch.searchsorted(boundaries, x.t().contiguous(), right=True).t()
        return torch.where(found > 0, found * 2 + 1, found) + torch.arange(
            boundaries.shape[0], device=x.device
        )


def get_inputs():
    return [torch.randn(ROWS, FEATURES), torch.randn(FEATURES, BOUNDARIES).sort(dim=1).values]
