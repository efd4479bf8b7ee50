"""MapId: raw feature ids remapped to embedding rows by binary search in a sorted vocabulary."""

import torch
import torch.nn as nn

family = "ranking"
IDS, VOCABULARY = 65536, 16384
shapes = {
    "cpu": {"IDS": 65536, "VOCABULARY": 16384},
    "gpu": {"IDS": 4194304, "VOCABULARY": 1048576},
    "ragged": {"IDS": 1009, "VOCABULARY": 257},
}


class Model(nn.Module):
    """Ids that the vocabulary lacks map to row 0, the others to their position plus one."""

    def forward(self, ids, vocabulary):
        position = torch.searchsorted(vocabulary, ids).clamp(max=vocabulary.shape[0] - 1)
        known = vocabulary[position] == ids
        return torch.where(known, position + 1, torch.zeros_like(position))


def get_inputs():
    vocabulary = torch.cumsum(torch.randint(1, 4, (VOCABULARY,)), dim=0)
    ids = torch.randint(0, 2 * VOCABULARY, (IDS,))
    return [ids, vocabulary]
