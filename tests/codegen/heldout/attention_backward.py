import torch
import torch.nn as nn
import torch.nn.functional as F

backward = True


class Model(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


def get_inputs():
    # Of a few hundred elements the one with the largest error decides, which is twice the reference's own now and then.
    return [torch.randn(2, 4, 64, 16) for _ in range(3)]
