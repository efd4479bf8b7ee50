"""Every channel convolved on its own, in half precision: no product, but taps in one kernel."""

import torch
import torch.nn as nn

HEIGHT = 16
shapes = {"ragged": {"HEIGHT": 9}}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.image = nn.Conv2d(12, 12, 3, padding=1, groups=12).half()

    def forward(self, x):
        return torch.relu(self.image(x))


def get_inputs():
    return [torch.randn(2, 12, HEIGHT, 10).half()]


def get_init_inputs():
    return []
