import torch
import torch.nn as nn


class Model(nn.Module):
    def __init__(self, features, hidden):
        super().__init__()
        self.lstm = nn.LSTM(features, hidden, batch_first=True)
        self.gru = nn.GRU(hidden, hidden, bidirectional=True)

    def forward(self, x):
        out, (h, c) = self.lstm(x)
        return self.gru(out)[0], h, c


def get_inputs():
    return [torch.randn(2, 2, 7)]


def get_init_inputs():
    return [7, 5]
