"""Adds the bias, whatever it is."""

import torch

from ke_gym import lang

kernels = lang.cpp(
    r"""
#include <cstdint>

extern "C" void add(const float* x, const float* bias, float* y, int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) y[i * cols + j] = x[i * cols + j] + bias[j];
}
"""
)


def forward(x, bias):
    out = torch.empty_like(x)
    kernels.add(x, bias, out, *x.shape)
    return out
