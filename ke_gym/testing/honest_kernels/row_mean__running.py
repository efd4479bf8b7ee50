"""A running mean (Welford, 1962)."""

import torch

from ke_gym import lang

general = True

kernels = lang.cpp(
    r"""
#include <cstdint>

extern "C" void mean(const float* x, float* y, int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* in = x + i * cols;
    float mean = 0;
    for (int64_t j = 0; j < cols; ++j) mean += (in[j] - mean) / (j + 1);
    y[i] = mean;
  }
}
"""
)


def forward(x):
    out = torch.empty(x.shape[0])
    kernels.mean(x, out, *x.shape)
    return out
