"""Attention in half precision of heads that lie side by side, causal and with fewer heads of keys, and what is made of it."""

import torch
import torch.nn as nn
import torch.nn.functional as F

BATCH, LENGTH, HEADS, SIZE = 3, 16, 4, 8


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(HEADS * SIZE, 3 * HEADS * SIZE).half()
        self.out = nn.Linear(HEADS * SIZE, HEADS * SIZE).half()

    def forward(self, x, mask):
        q, k, v = (part.view(BATCH, LENGTH, HEADS, SIZE).transpose(1, 2) for part in self.mix(x).chunk(3, -1))
        causal = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        shared = F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True)
        masked = F.scaled_dot_product_attention(q.contiguous(), k, v, attn_mask=mask)
        return self.out(causal.transpose(1, 2).reshape(x.shape)) + x, shared * 2.0, masked + 1.0


def get_inputs():
    return [torch.randn(BATCH, LENGTH, HEADS * SIZE).half(), torch.randn(LENGTH, LENGTH).half()]


def get_init_inputs():
    return []
