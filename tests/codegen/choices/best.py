"""Choices the library makes of quotients: which rounding they have decides between neighbours."""

import torch
import torch.nn as nn

PLACES = True
shapes = {"ragged": {}}


class Model(nn.Module):
    def forward(self, x):
        values, places = torch.topk(x / 3.0, 4)
        return places if PLACES else values


def get_inputs():
    return [torch.randn(8, 64)]


def get_init_inputs():
    return []
