"""Two convolutions over images in half precision, an activation between them, and a sum behind."""

import torch
import torch.nn as nn

HEIGHT = 16
shapes = {"ragged": {"HEIGHT": 7}}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(8, 24, 3, padding=1).half()
        self.second = nn.Conv2d(24, 8, (3, 1), stride=(2, 1), bias=False).half()

    def forward(self, x):
        return self.second(torch.relu(self.first(x))) + 1


def get_inputs():
    return [torch.randn(2, 8, HEIGHT, 10).half()]


def get_init_inputs():
    return []
