"""Sums in double."""

import torch

from ke_gym import lang

general = True

kernels = lang.cpp(
    r"""
#include <cstdint>

extern "C" void mean(const float* x, float* y, int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* in = x + i * cols;
    double sum = 0;
    for (int64_t j = 0; j < cols; ++j) sum += in[j];
    y[i] = sum / cols;
  }
}
"""
)


def forward(x):
    out = torch.empty(x.shape[0])
    kernels.mean(x, out, *x.shape)
    return out
