import torch
import torch.nn as nn
import torch.nn.functional as F


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.max1 = nn.MaxPool1d(4, stride=2, padding=1, dilation=2)
        self.avg1 = nn.AvgPool1d(3, stride=1, padding=1)
        self.max2 = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)
        self.avg2 = nn.AvgPool2d((2, 3), padding=(1, 1), count_include_pad=False)
        self.max3 = nn.MaxPool3d(2)
        self.avg3 = nn.AvgPool3d(3, stride=2, padding=1)

    def forward(self, row, image, volume):
        return (
            self.max1(row),
            self.avg1(row),
            self.max2(image),
            self.avg2(image),
            self.max3(volume),
            self.avg3(volume),
            F.adaptive_avg_pool2d(image, (5, 3)),
            F.adaptive_max_pool2d(image, (3, 2)),
        )


def get_inputs():
    return [torch.randn(2, 5, 64), torch.randn(2, 3, 15, 18), torch.randn(1, 2, 8, 10, 12)]


def get_init_inputs():
    return []
