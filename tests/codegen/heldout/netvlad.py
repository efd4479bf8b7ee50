import torch
import torch.nn as nn
import torch.nn.functional as F


class Model(nn.Module):
    def __init__(self, clusters, features):
        super().__init__()
        self.clusters = nn.Parameter(torch.randn(features, clusters))
        self.norm = nn.BatchNorm1d(clusters)
        self.centres = nn.Parameter(torch.randn(1, features, clusters))
        self.eval()

    def forward(self, x):
        batch, length, features = x.shape
        assignment = self.norm(x.reshape(-1, features) @ self.clusters)
        assignment = F.softmax(assignment, dim=1).view(batch, length, -1)
        offset = assignment.sum(dim=1, keepdim=True) * self.centres
        vlad = torch.matmul(assignment.transpose(1, 2), x).transpose(1, 2) - offset
        return F.normalize(F.normalize(vlad).reshape(batch, -1))


def get_inputs():
    return [torch.randn(24, 10, 14)]


def get_init_inputs():
    return [6, 14]
