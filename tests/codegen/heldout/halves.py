"""What is computed beyond half precision and comes back in it: sums over rows, windows, variances, places of extremes."""

import torch
import torch.nn as nn
import torch.nn.functional as F

ROWS, COLS = 3000, 24


class Model(nn.Module):
    def forward(self, x, image):
        wide = torch.sigmoid(x)
        spread, _ = torch.var_mean(x, dim=1)
        top, place = torch.max(wide, dim=1)
        return (
            wide.sum(0), F.max_pool2d(image, 2), torch.var(image, dim=(1, 2)), spread, torch.argmax(x * 1.5, dim=1),
            top, place,
        )  # fmt: skip


def get_inputs():
    return [torch.randn(ROWS, COLS).half(), torch.randn(3, 4, 8, 10, dtype=torch.bfloat16)]


def get_init_inputs():
    return []
