"""Packs the weights in its preparation, so that the inner loop runs along the outputs."""

import torch

from ke_gym import lang

kernels = lang.cpp(
    r"""
#include <cstdint>

extern "C" void pack(const float* w, float* packed, int64_t cols, int64_t inner) {
  for (int64_t j = 0; j < cols; ++j)
    for (int64_t k = 0; k < inner; ++k) packed[k * cols + j] = w[j * inner + k];
}

extern "C" void linear(const float* x, const float* packed, const float* b, float* y, int64_t rows, int64_t inner, int64_t cols) {
  for (int64_t i = 0; i < rows; ++i) {
    float* row = y + i * cols;
    for (int64_t j = 0; j < cols; ++j) row[j] = b[j];
    for (int64_t k = 0; k < inner; ++k)
      for (int64_t j = 0; j < cols; ++j) row[j] += x[i * inner + k] * packed[k * cols + j];
    for (int64_t j = 0; j < cols; ++j) row[j] = row[j] < 0 ? 0 : row[j];
  }
}
"""
)


def prepare(linear_weight):
    cols, inner = linear_weight.shape
    packed = torch.empty(inner, cols)
    kernels.pack(linear_weight, packed, cols, inner)
    return {"packed": packed}


def forward(x, linear_bias, packed):
    out = torch.empty(x.shape[0], packed.shape[1])
    kernels.linear(x, packed, linear_bias, out, *x.shape, packed.shape[1])
    return out
