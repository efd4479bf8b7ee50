"""The most recent events of every user: ids and ages, right-aligned, and their counts."""

import torch
import torch.nn as nn

family = "ranking"
ROWS, TOTAL, KEEP = 4096, 262144, 100
shapes = {
    "cpu": {"ROWS": 4096, "TOTAL": 262144, "KEEP": 100},
    "gpu": {"ROWS": 65536, "TOTAL": 16777216, "KEEP": 200},
    "ragged": {"ROWS": 31, "TOTAL": 401, "KEEP": 13},
}


class Model(nn.Module):
    def __init__(self, keep):
        super().__init__()
        self.keep = keep

    def forward(self, ids, ages, offsets):
        ends = offsets[1:, None]
        source = ends - self.keep + torch.arange(self.keep, device=ids.device)
        inside = source >= offsets[:-1, None]
        source = source.clamp(min=0)
        kept_ids = torch.where(inside, ids[source], -1)
        kept_ages = torch.where(inside, torch.log1p(ages[source]), 0.0)
        return kept_ids, kept_ages, inside.sum(dim=1)


def get_inputs():
    cuts = torch.randint(0, TOTAL + 1, (ROWS - 1,)).sort().values
    offsets = torch.cat([torch.tensor([0]), cuts, torch.tensor([TOTAL])])
    return [torch.randint(0, 1 << 40, (TOTAL,)), torch.rand(TOTAL) * 3600, offsets]


def get_init_inputs():
    return [KEEP]
