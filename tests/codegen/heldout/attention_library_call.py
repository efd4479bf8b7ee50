import torch
import torch.nn as nn


class Model(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        out, weights = self.attention(x, x, x)
        return self.norm(out + x), weights


def get_inputs():
    return [torch.randn(2, 11, 24)]


def get_init_inputs():
    return [24, 3]
