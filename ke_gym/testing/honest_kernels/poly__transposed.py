"""Works on the transpose and returns a view of it."""

import torch

from ke_gym import lang

kernels = lang.cpp(
    r"""
#include <cstdint>

extern "C" void poly(const float* x, float* y, int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) y[j * rows + i] = x[i * cols + j] * x[i * cols + j] + x[i * cols + j];
}
"""
)


def forward(x):
    out = torch.empty(x.shape[1], x.shape[0])
    kernels.poly(x, out, *x.shape)
    return out.t()
