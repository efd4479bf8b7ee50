"""The product by the library, bias and ReLU by a kernel."""

import torch

from ke_gym import lang

kernels = lang.cpp(
    r"""
#include <cstdint>

extern "C" void epilogue(const float* product, const float* b, float* y, int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) {
      const float v = product[i * cols + j] + b[j];
      y[i * cols + j] = v < 0 ? 0 : v;
    }
}
"""
)


def forward(x, linear_weight, linear_bias):
    product = torch.mm(x, linear_weight.t())
    out = torch.empty_like(product)
    kernels.epilogue(product, linear_bias, out, *out.shape)
    return out
