"""What is found is padded: a search that is made for some columns only."""

import torch
import torch.nn as nn
import torch.nn.functional as F

ROWS, FEATURES, BOUNDARIES = 67, 40, 50
shapes = {"cpu": {"ROWS": 67}, "gpu": {"ROWS": 67}, "ragged": {"ROWS": 67}}


class Model(nn.Module):
    def forward(self, x, boundaries):
        return F.pad(torch.searchsorted(boundaries, x.t().contiguous()).t(), (3, 5), value=-1)


def get_inputs():
    return [torch.randn(ROWS, FEATURES), torch.randn(FEATURES, BOUNDARIES).sort(dim=1).values]
