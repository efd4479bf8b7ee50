"""Writes into rows that are longer than needed and returns what counts."""

import torch

from ke_gym import lang

kernels = lang.cpp(
    r"""
#include <cstdint>

extern "C" void poly(const float* x, float* y, int64_t rows, int64_t cols, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) y[i * stride + j] = x[i * cols + j] * x[i * cols + j] + x[i * cols + j];
}
"""
)


def forward(x):
    rows, cols = x.shape
    out = torch.empty(rows, cols + 16)
    kernels.poly(x, out, rows, cols, cols + 16)
    return out[:, :cols]
