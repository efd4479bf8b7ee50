"""Eight accumulators and a tail."""

import torch

from ke_gym import lang

general = True

kernels = lang.cpp(
    r"""
#include <cstdint>

extern "C" void mean(const float* x, float* y, int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* in = x + i * cols;
    float lanes[8] = {};
    int64_t j = 0;
    for (; j + 8 <= cols; j += 8)
      for (int64_t k = 0; k < 8; ++k) lanes[k] += in[j + k];
    for (; j < cols; ++j) lanes[0] += in[j];
    float sum = 0;
    for (float lane : lanes) sum += lane;
    y[i] = sum / cols;
  }
}
"""
)


def forward(x):
    out = torch.empty(x.shape[0])
    kernels.mean(x, out, *x.shape)
    return out
