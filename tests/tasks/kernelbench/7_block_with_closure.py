import torch
import torch.nn as nn


class Model(nn.Module):
    """A transformer's feed-forward part whose forward goes through a lambda over the module's own layers."""

    def __init__(self, width, dropout):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict(
            {
                "up": nn.Linear(width, 4 * width),
                "down": nn.Linear(4 * width, width),
                "act": nn.GELU(),
                "dropout": nn.Dropout(dropout),
            }
        )
        m = self.mlp
        self.mlpf = lambda x: m.dropout(m.down(m.act(m.up(x))))

    def forward(self, x):
        return x + self.mlpf(self.norm(x))


width = 12
dropout = 0.0


def get_inputs():
    return [torch.rand(5, 7, width)]


def get_init_inputs():
    return [width, dropout]
