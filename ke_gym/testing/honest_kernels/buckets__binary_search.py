"""Halves the edges."""

import torch

from ke_gym import lang

kernels = lang.cpp(
    r"""
#include <cstdint>

extern "C" void buckets(const float* x, const float* edges, int64_t* y, int64_t n, int64_t count) {
  for (int64_t i = 0; i < n; ++i) {
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (!(edges[middle] >= x[i]))
        low = middle + 1;
      else
        high = middle;
    }
    y[i] = low;
  }
}
"""
)


def forward(x, edges):
    out = torch.empty(x.shape, dtype=torch.int64)
    kernels.buckets(x, edges, out, x.numel(), edges.numel())
    return out
