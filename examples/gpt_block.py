"""A task: a GPT block in fp16, as a user would write it (docs/results.md has what became of it on a GPU)."""

import torch
import torch.nn as nn
import torch.nn.functional as F

BATCH, LENGTH, WIDTH, HEADS = 8, 1024, 1024, 16


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH).half(), nn.LayerNorm(WIDTH).half()
        self.mix, self.out = nn.Linear(WIDTH, 3 * WIDTH).half(), nn.Linear(WIDTH, WIDTH).half()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH).half(), nn.Linear(4 * WIDTH, WIDTH).half()

    def forward(self, x):
        q, k, v = (
            part.view(BATCH, LENGTH, HEADS, WIDTH // HEADS).transpose(1, 2)
            for part in self.mix(self.norm1(x)).chunk(3, -1)
        )
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def get_inputs():
    return [torch.randn(BATCH, LENGTH, WIDTH).half()]


def get_init_inputs():
    return []
