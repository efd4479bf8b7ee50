import torch
import torch.nn as nn
import torch.nn.functional as F


class Model(nn.Module):
    def __init__(self, channels, state):
        super().__init__()
        self.a = nn.Parameter(torch.rand(channels, state) * -1.0)
        self.d = nn.Parameter(torch.randn(channels))

    def forward(self, x, delta, b, c):
        delta = F.softplus(delta)
        decay = torch.exp(delta.unsqueeze(-1) * self.a)
        drive = delta.unsqueeze(-1) * b.unsqueeze(2) * x.unsqueeze(-1)
        state = torch.zeros_like(decay[:, 0])
        outputs = []
        for t in range(x.shape[1]):
            state = decay[:, t] * state + drive[:, t]
            outputs.append((state * c[:, t].unsqueeze(1)).sum(-1))
        return torch.stack(outputs, dim=1) + x * self.d


def get_inputs():
    return [torch.randn(2, 6, 10), torch.randn(2, 6, 10), torch.randn(2, 6, 4), torch.randn(2, 6, 4)]


def get_init_inputs():
    return [10, 4]
