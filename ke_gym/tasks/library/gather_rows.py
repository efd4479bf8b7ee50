"""Token and position embeddings looked up and added."""

import torch
import torch.nn as nn

family = "gather"
BATCH, LENGTH, VOCABULARY, DIM = 16, 512, 20000, 512
shapes = {
    "cpu": {"BATCH": 16, "LENGTH": 512, "VOCABULARY": 20000, "DIM": 512},
    "gpu": {"BATCH": 64, "LENGTH": 2048, "VOCABULARY": 128256, "DIM": 4096},
    "ragged": {"BATCH": 3, "LENGTH": 43, "VOCABULARY": 251, "DIM": 72},
}


class Model(nn.Module):
    def __init__(self, vocabulary, length, dim):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, dim)
        self.positions = nn.Embedding(length, dim)

    def forward(self, ids):
        position = torch.arange(ids.shape[1], device=ids.device)
        return self.tokens(ids) + self.positions(position)


def get_inputs():
    return [torch.randint(0, VOCABULARY, (BATCH, LENGTH))]


def get_init_inputs():
    return [VOCABULARY, LENGTH, DIM]
