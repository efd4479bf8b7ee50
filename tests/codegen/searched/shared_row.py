"""Elements of a matrix in the same buckets, whose bounds are doubles."""

import torch
import torch.nn as nn

ROWS, COLUMNS = 33, 70
shapes = {"cpu": {"ROWS": 33}, "gpu": {"ROWS": 33}, "ragged": {"ROWS": 33}}


class Model(nn.Module):
    def forward(self, x, bounds):
        return torch.bucketize(x, bounds, out_int32=True, right=True)


def get_inputs():
    return [torch.randn(ROWS, COLUMNS, dtype=torch.float64), torch.linspace(-2, 2, 63, dtype=torch.float64)]
