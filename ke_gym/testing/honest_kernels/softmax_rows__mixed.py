"""The maximum by ATen, the rest by a kernel."""

import torch

from ke_gym import lang

kernels = lang.cpp(
    r"""
#include <cstdint>

#include <ke/math.h>

extern "C" void softmax(const float* x, const float* top, float* y, int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; ++i) {
    float sum = 0;
    for (int64_t j = 0; j < cols; ++j) sum += y[i * cols + j] = ke::exp(x[i * cols + j] - top[i]);
    for (int64_t j = 0; j < cols; ++j) y[i * cols + j] /= sum;
  }
}
"""
)


def forward(x):
    out = torch.empty_like(x)
    kernels.softmax(x, torch.amax(x, dim=1), out, *x.shape)
    return out
