import torch
import torch.nn as nn


class Model(nn.Module):
    def __init__(self, image, patch, width):
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(3 * patch * patch, width)
        self.position = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, width))
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        p = self.patch
        x = x.unfold(2, p, p).unfold(3, p, p).reshape(x.shape[0], -1, p * p * 3)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), self.embed(x)), dim=1)
        return self.norm(x + self.position)


def get_inputs():
    return [torch.randn(2, 3, 16, 16)]


def get_init_inputs():
    return [16, 4, 24]
