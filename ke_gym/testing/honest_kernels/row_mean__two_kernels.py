"""Partial sums in a workspace, then their sum."""

import torch

from ke_gym import lang

general = True

kernels = lang.cpp(
    r"""
#include <cstdint>

extern "C" void partial(const float* x, float* sums, int64_t rows, int64_t cols) {
#pragma omp parallel for
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < 4; ++k) sums[4 * i + k] = 0;
    for (int64_t j = 0; j < cols; ++j) sums[4 * i + j % 4] += x[i * cols + j];
  }
}

extern "C" void finish(const float* sums, float* y, int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; ++i)
    y[i] = ((sums[4 * i] + sums[4 * i + 1]) + (sums[4 * i + 2] + sums[4 * i + 3])) / cols;
}
"""
)


def forward(x):
    sums, out = torch.empty(x.shape[0], 4), torch.empty(x.shape[0])
    kernels.partial(x, sums, *x.shape)
    kernels.finish(sums, out, *x.shape)
    return out
