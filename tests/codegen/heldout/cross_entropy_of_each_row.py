"""A loss of each row, its classes computed from the row: several values of a row are needed before and after its sum."""

import torch
import torch.nn as nn
import torch.nn.functional as F

backward = True


class Model(nn.Module):
    def forward(self, x):
        places = torch.nan_to_num(x * 7.0).clamp(-70.0, 70.0).abs().long()
        return F.cross_entropy(x, places.sum(1) % 10, reduction="none") * 1.5


def get_inputs():
    return [torch.randn(512, 10)]


def get_init_inputs():
    return []
