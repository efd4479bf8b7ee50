"""Pairwise interactions of feature embeddings, compressed (the FM block of WuKong)."""

import math

import torch
import torch.nn as nn

family = "ranking"
BATCH, FEATURES, DIM, RANK = 2048, 24, 64, 16
shapes = {
    "cpu": {"BATCH": 2048, "FEATURES": 24, "DIM": 64, "RANK": 16},
    "gpu": {"BATCH": 16384, "FEATURES": 48, "DIM": 128, "RANK": 32},
    "ragged": {"BATCH": 19, "FEATURES": 11, "DIM": 23, "RANK": 5},
}


class Model(nn.Module):
    """Zhang et al., "Wukong: Towards a Scaling Law for Large-Scale Recommendation", 2024."""

    def __init__(self, features, rank):
        super().__init__()
        self.projection = nn.Parameter(torch.randn(features, rank) / math.sqrt(features))

    def forward(self, x):
        interactions = torch.bmm(x, x.transpose(1, 2))
        return (interactions @ self.projection).flatten(1)


def get_inputs():
    return [torch.randn(BATCH, FEATURES, DIM)]


def get_init_inputs():
    return [FEATURES, RANK]
