import torch
import torch.nn as nn
import torch.nn.functional as F


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        h = F.relu(self.a(x))
        return self.b(h) + h


def get_inputs():
    return [torch.randn(24, 32)]
