import torch
import torch.nn as nn


class Model(nn.Module):
    def __init__(self, channels, features):
        super().__init__()
        self.asymmetric = nn.Conv2d(
            channels, features, (3, 5), stride=(1, 2), padding=(1, 2), dilation=(2, 1)
        )
        self.depthwise = nn.Conv2d(features, features, 3, padding=1, groups=features, bias=False)
        self.pointwise = nn.Conv2d(features, channels, 1)
        self.grouped = nn.ConvTranspose2d(channels, features, 3, stride=2, groups=2, padding=1)

    def forward(self, x):
        return self.grouped(self.pointwise(self.depthwise(self.asymmetric(x))))


def get_inputs():
    return [torch.randn(2, 4, 17, 22)]


def get_init_inputs():
    return [4, 8]
