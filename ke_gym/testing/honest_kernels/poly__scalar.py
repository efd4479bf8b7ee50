"""Scalar code without vectors: slow, and right."""

import torch

from ke_gym import lang

kernels = lang.cpp(
    r"""
#include <cstdint>

extern "C" void poly(const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = x[i] * x[i] + x[i];
}
""",
    flags="-O1 -fno-tree-vectorize",
)


def forward(x):
    out = torch.empty_like(x)
    kernels.poly(x, out, x.numel())
    return out
