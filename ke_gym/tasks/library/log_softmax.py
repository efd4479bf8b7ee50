"""Log-softmax of logits that are scaled and masked first."""

import torch
import torch.nn as nn

family = "softmax"
ROWS, COLS = 2048, 2000
shapes = {
    "cpu": {"ROWS": 2048, "COLS": 2000},
    "gpu": {"ROWS": 16384, "COLS": 32000},
    "ragged": {"ROWS": 67, "COLS": 401},
}


class Model(nn.Module):
    def forward(self, logits, banned):
        scaled = (logits / 1.3).masked_fill(banned, -1e4)
        return torch.log_softmax(scaled, dim=-1)


def get_inputs():
    return [torch.randn(ROWS, COLS), torch.rand(COLS) < 0.1]
