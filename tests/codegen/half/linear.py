"""A linear layer in half precision, whose bias the library adds before it rounds."""

import torch
import torch.nn as nn

ROWS = 64
shapes = {"ragged": {"ROWS": 43}}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(37, 29).half()

    def forward(self, x):
        return self.linear(x) * torch.sigmoid(x[:, :1])


def get_inputs():
    return [torch.randn(ROWS, 37).half()]


def get_init_inputs():
    return []
