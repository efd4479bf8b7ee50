"""Library calls whose results lie as their arguments do, on what lies otherwise: transposed, permuted, with channels last."""

import torch
import torch.nn as nn

ROWS, COLS = 12, 20


class Model(nn.Module):
    def forward(self, x, image):
        turned = torch.relu(x).t()
        gamma = torch.digamma(turned + 2.0) * turned
        last = image.permute(0, 2, 3, 1) * 2.0
        special = torch.special.i0e(last) + last
        values, places = torch.sort(torch.exp(x).t(), dim=0)
        near = torch.lgamma(torch.sigmoid(image).to(memory_format=torch.channels_last) + 1.0)
        return gamma + 1.0, special.sum(-1), values * 2.0, places, near - 1.0


def get_inputs():
    return [torch.randn(ROWS, COLS), torch.randn(3, 4, 5, 6)]


def get_init_inputs():
    return []
