"""Sums halves of halves."""

import torch

from ke_gym import lang

general = True

kernels = lang.cpp(
    r"""
#include <cstdint>

static float sum(const float* v, int64_t n) {
  if (n > 16) return sum(v, n / 2) + sum(v + n / 2, n - n / 2);
  float total = 0;
  for (int64_t i = 0; i < n; ++i) total += v[i];
  return total;
}

extern "C" void mean(const float* x, float* y, int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* in = x + i * cols;
    y[i] = sum(in, cols) / cols;
  }
}
"""
)


def forward(x):
    out = torch.empty(x.shape[0])
    kernels.mean(x, out, *x.shape)
    return out
