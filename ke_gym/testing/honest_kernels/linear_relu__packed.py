"""Packs the weights in every call, then adds rows of them."""

import torch

from ke_gym import lang

kernels = lang.cpp(
    r"""
#include <cstdint>
#include <vector>

extern "C" void linear(const float* x, const float* w, const float* b, float* y, int64_t rows, int64_t inner, int64_t cols) {
  std::vector<float> packed(inner * cols);
  for (int64_t j = 0; j < cols; ++j)
    for (int64_t k = 0; k < inner; ++k) packed[k * cols + j] = w[j * inner + k];
  for (int64_t i = 0; i < rows; ++i) {
    float* out = y + i * cols;
    for (int64_t j = 0; j < cols; ++j) out[j] = b[j];
    for (int64_t k = 0; k < inner; ++k)
      for (int64_t j = 0; j < cols; ++j) out[j] += x[i * inner + k] * packed[k * cols + j];
    for (int64_t j = 0; j < cols; ++j) out[j] = out[j] < 0 ? 0 : out[j];
  }
}
"""
)


def forward(x, linear_weight, linear_bias):
    out = torch.empty(x.shape[0], linear_weight.shape[0])
    kernels.linear(x, linear_weight, linear_bias, out, *x.shape, linear_weight.shape[0])
    return out
