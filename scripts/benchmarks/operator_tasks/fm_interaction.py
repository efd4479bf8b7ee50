"""Pairwise interactions of N feature embeddings, compressed: the factorization machine block of WuKong."""

import math

import torch
import torch.nn as nn

family = "ranking"
BATCH, FEATURES, DIM, RANK, DTYPE = 512, 24, 64, 16, torch.float32
shapes = {
    "cpu": {"BATCH": 512},
    "gpu": {"BATCH": 8192, "DIM": 128, "RANK": 32, "DTYPE": torch.float16},
}


class Model(nn.Module):
    """Zhang et al., "Wukong: Towards a Scaling Law for Large-Scale Recommendation", 2024."""

    def __init__(self, features, rank):
        super().__init__()
        self.projection = nn.Parameter((torch.randn(features, rank) / math.sqrt(features)).to(DTYPE))

    def forward(self, x):
        interactions = torch.bmm(x, x.transpose(1, 2))
        return (interactions @ self.projection).flatten(1)


def get_inputs():
    return [torch.randn(BATCH, FEATURES, DIM, dtype=DTYPE)]


def get_init_inputs():
    return [FEATURES, RANK]
