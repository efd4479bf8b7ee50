import torch
import torch.nn as nn


class Model(nn.Module):
    def __init__(self, features, hidden, batch):
        super().__init__()
        self.hidden = torch.randn(batch, hidden)
        self.step = nn.Linear(features + hidden, hidden)
        self.head = nn.Linear(hidden, 7)
        self.mask = torch.full((3, 3), float("-inf")).triu(1)

    def forward(self, x):
        self.hidden = self.hidden.to(x.device)
        self.hidden = torch.tanh(self.step(torch.cat((x, self.hidden), dim=1)))
        return self.head(self.hidden), torch.softmax(x[:3, :3] + self.mask, dim=-1)


def get_inputs():
    return [torch.randn(16, 24)]


def get_init_inputs():
    return [24, 300, 16]
