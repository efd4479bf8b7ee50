"""A constant that is drawn after parameters so large that a capture would rather not draw them."""

import torch
import torch.nn as nn

COUNT, WIDTH, CODES = 6, 64, 70000


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.codes = nn.Embedding(CODES, WIDTH)
        self.noise = torch.rand(WIDTH)

    def forward(self, places):
        return torch.tanh(self.codes(places) + self.noise.to(places.device))


def get_inputs():
    return [torch.randint(0, CODES, (COUNT,))]


def get_init_inputs():
    return []
