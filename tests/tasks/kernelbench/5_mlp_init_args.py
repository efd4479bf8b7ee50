import torch
import torch.nn as nn
import torch.nn.functional as F


class Model(nn.Module):
    def __init__(self, input_size, layer_sizes, output_size, *, bias=True):
        """
        :param input_size: The number of input features
        :param layer_sizes: A list of ints containing the sizes of each hidden layer
        :param output_size: The number of output features
        """
        super().__init__()
        layers = []
        for size in layer_sizes:
            layers += [nn.Linear(input_size, size, bias=bias), nn.ReLU()]
            input_size = size
        self.network = nn.Sequential(*layers, nn.Linear(input_size, output_size))

    def forward(self, x):
        return F.normalize(self.network(x), dim=-1)


batch_size = 8
input_size = 24
layer_sizes = [32, 16]
output_size = 5


def get_inputs():
    return [torch.rand(batch_size, input_size)]


def get_init_inputs():
    return [input_size, layer_sizes, output_size]
