"""How many of a row there are, by a test that all of them pass, and their sum."""

import torch
import torch.nn as nn

family = "reduction"
ROWS, COLS = 64, 320
shapes = {"cpu": {"ROWS": 64, "COLS": 320}, "ragged": {"ROWS": 13, "COLS": 150}}


class Model(nn.Module):
    def forward(self, x):
        columns, rows = torch.arange(COLS, device=x.device), torch.arange(x.shape[0], device=x.device)
        return (columns[None, :] <= rows[:, None] + 1000).sum(-1), x.sum(-1)


def get_inputs():
    return [torch.randn(ROWS, COLS)]
