import torch
import torch.nn as nn


class Model(nn.Module):
    def forward(self, x):
        least, where = torch.min(x, dim=1)
        return (
            torch.argmax(x, dim=2),
            torch.argmin(x, dim=0),
            least,
            where,
            torch.amax(x, dim=(0, 2)),
            x.median(dim=-1)[0],
        )


def get_inputs():
    return [torch.randn(7, 19, 23)]


def get_init_inputs():
    return []
