"""A reference that raises for some of what a judge would try: what is no number, or has no inverse."""

import torch
import torch.nn as nn

SIZE = 12


class Model(nn.Module):
    def forward(self, x):
        root = torch.linalg.cholesky(x @ x.t() + SIZE * torch.eye(SIZE, device=x.device))
        return torch.log(root.diagonal()).sum(), root * 2.0


def get_inputs():
    return [torch.randn(SIZE, SIZE)]


def get_init_inputs():
    return []
