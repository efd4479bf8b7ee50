"""What lies behind a limit of its row, its exponential, and how much of it there is."""

import torch
import torch.nn as nn

family = "ranking"
ROWS, COLS = 64, 320
shapes = {"cpu": {"ROWS": 64, "COLS": 320}, "ragged": {"ROWS": 13, "COLS": 150}}


class Model(nn.Module):
    def forward(self, x, y, limits):
        inside = torch.arange(x.shape[1], device=x.device) >= limits[:, None]
        return torch.where(inside, x, -1.0), torch.where(inside, torch.exp(y), 0.0), inside.sum(dim=1)


def get_inputs():
    return [torch.rand(ROWS, COLS), torch.rand(ROWS, COLS), torch.randint(0, COLS + 1, (ROWS,))]
