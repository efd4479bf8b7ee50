"""One parallel loop."""

import torch

from ke_gym import lang

kernels = lang.cpp(
    r"""
#include <cstdint>

extern "C" void poly(const float* x, float* y, int64_t n) {
#pragma omp parallel for simd schedule(static)
  for (int64_t i = 0; i < n; ++i) y[i] = x[i] * x[i] + x[i];
}
"""
)


def forward(x):
    out = torch.empty_like(x)
    kernels.poly(x, out, x.numel())
    return out
