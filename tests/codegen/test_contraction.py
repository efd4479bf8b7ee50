"""Emitted contractions compute what torch computes, with fused code before and after."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ke_gym.codegen.contraction import (
    AttentionProblem,
    AttentionSchedule,
    ConvProblem,
    ConvSchedule,
    GemmProblem,
    GemmSchedule,
    emit_attention,
    emit_conv,
    emit_gemm,
)

from .contraction_build import C_TYPES, call, compile_library, relative_error, strided, vector_bytes

WIDTH = vector_bytes()
NAMES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}


def kernel(name: str, operands: dict[str, torch.Tensor], statement: str) -> str:
    pointers = "\n".join(
        f"  [[maybe_unused]] auto* {operand} = static_cast<{C_TYPES[t.dtype]}*>(tensors[{i}]);"
        for i, (operand, t) in enumerate(operands.items())
    )
    return f'extern "C" void {name}(void* const* tensors, const int64_t*) {{\n{pointers}\n{statement}\n}}\n'


def run(header: str, operands: dict[str, torch.Tensor], statement: str) -> None:
    library = compile_library(f'#include "ke/{header}.h"\n' + kernel("kernel", operands, statement))
    call(library.kernel, list(operands.values()))


def test_dot_products_of_bf16_are_offered_where_nothing_else_is_rounded() -> None:
    def offered(dtype: str, precision: Any) -> bool:
        problem = GemmProblem(64, 64, 64, (64, 1), (64, 1), (), dtype, dtype, precision)
        return True in GemmSchedule.choices(problem)["matrix_unit"]

    assert offered("f32", "bf16") and offered("bf16", "strict")
    assert not offered("f64", "bf16") and not offered("f32", "strict") and not offered("f16", "strict")


GEMM_CASES = [
    # batch, m, n, k, transpose b, dtypes, schedule changes
    ((), 61, 70, 45, True, torch.float32, {}),
    ((), 130, 97, 401, False, torch.float32, {"tile": (4, 32), "mc": 2}),
    ((), 33, 64, 700, True, torch.float32, {"nc": 1, "mc": 0, "kc": 64}),
    ((), 7, 257, 130, True, torch.float32, {"form": "stream"}),
    ((), 11, 257, 131, False, torch.float32, {"form": "stream"}),
    ((3, 4), 20, 17, 33, False, torch.float32, {"mc": 0}),
    ((3,), 40, 70, 33, False, torch.float32, {"mc": 2, "nc": 1}),
    ((), 29, 40, 65, True, torch.float64, {"tile": (6, 16)}),
    ((), 29, 90, 65, True, torch.bfloat16, {}),
    ((2,), 9, 90, 65, True, torch.float16, {}),
]


@pytest.mark.parametrize(("batch", "m", "n", "k", "transpose", "dtype", "changes"), GEMM_CASES)
def test_gemm_with_epilogue(batch, m, n, k, transpose, dtype, changes):
    x = strided([*batch, m, k], range(len(batch) + 2), dtype, pad=3)
    w = (
        strided([*batch, n, k], range(len(batch) + 2), dtype).mT
        if transpose
        else strided([*batch, k, n], range(len(batch) + 2), dtype)
    )
    problem = GemmProblem(m, n, k, x.stride(), w.stride(), tuple(batch), NAMES[dtype], NAMES[dtype])
    schedule = replace(GemmSchedule.default(problem, WIDTH), **changes)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    bias, out = torch.randn(n, dtype=acc), torch.full((*batch, m, n), 7.0, dtype=acc)
    epilogue = f"""
        {C_TYPES[acc]}* to = y + (batch * {m} + row) * {n} + col;
        for (int64_t c = 0; c < count; ++c) to[c] = acc[c] + bias[col + c];
    """
    statement = emit_gemm(problem, schedule, "x", "w", epilogue, vector_bytes=WIDTH)
    run("gemm", {"x": x, "w": w, "bias": bias, "y": out}, statement)
    expected = x.double() @ w.double() + bias.double()
    assert relative_error(out, expected) < (1e-13 if acc == torch.float64 else 2e-6)


@pytest.mark.parametrize("form", ["tiled", "stream"])
def test_gemm_prologue_and_broadcast(form):
    x, scale, w = torch.randn(3, 10, 50), torch.randn(50), torch.randn(50, 300)
    out = torch.empty(3, 10, 300)
    problem = GemmProblem(10, 300, 50, x.stride(), (0, *w.stride()), (3,))
    schedule = replace(GemmSchedule.default(problem, WIDTH), form=form)
    prologue = (
        "for (int64_t c = 0; c < count; ++c) out[c] = x[(batch * 10 + row) * 50 + k + c] * scale[k + c];"
    )
    epilogue = "for (int64_t c = 0; c < count; ++c) y[(batch * 10 + row) * 300 + col + c] = acc[c];"
    statement = emit_gemm(problem, schedule, "x", "w", epilogue, prologue, vector_bytes=WIDTH)
    run("gemm", {"x": x, "scale": scale, "w": w, "y": out}, statement)
    assert relative_error(out, (x.double() * scale.double()) @ w.double()) < 1e-6


def test_rows_in_order_allows_a_running_maximum():
    x, w, out = torch.randn(90, 64), torch.randn(64, 500), torch.full((90,), -torch.inf)
    problem = GemmProblem(90, 500, 64, x.stride(), w.stride())
    schedule = GemmSchedule.default(problem, WIDTH, rows_in_order=True)
    assert schedule.rows_in_order
    epilogue = "for (int64_t c = 0; c < count; ++c) y[row] = acc[c] > y[row] ? acc[c] : y[row];"
    run("gemm", {"x": x, "w": w, "y": out}, emit_gemm(problem, schedule, "x", "w", epilogue))
    assert relative_error(out, (x.double() @ w.double()).amax(1)) < 1e-6


def test_matrix_unit_rounds_operands_to_bfloat16_only():
    x, w, out = torch.randn(50, 201), torch.randn(201, 70), torch.empty(50, 70)
    problem = GemmProblem(50, 70, 201, x.stride(), w.stride(), precision="bf16")
    assert GemmSchedule.choices(problem, WIDTH)["matrix_unit"] == [False, True]
    assert GemmSchedule.choices(replace(problem, precision="strict"), WIDTH)["matrix_unit"] == [False]
    schedule = replace(GemmSchedule.default(problem, WIDTH), matrix_unit=True)
    epilogue = "for (int64_t c = 0; c < count; ++c) y[row * 70 + col + c] = acc[c];"
    run("gemm", {"x": x, "w": w, "y": out}, emit_gemm(problem, schedule, "x", "w", epilogue))
    assert relative_error(out, x.bfloat16().double() @ w.bfloat16().double()) < 1e-6
    assert relative_error(out, x.double() @ w.double()) > 1e-4


CONV_CASES = [
    # batch, in, out, groups, size, kernel, stride, padding, dilation, schedule changes
    (2, 5, 17, 1, (40,), (3,), (1,), (1,), (1,), {}),
    (3, 8, 8, 8, (19, 23), (3, 3), (2, 1), (1, 1), (1, 2), {}),
    (2, 6, 20, 2, (13, 11), (1, 1), (1, 1), (0, 0), (1, 1), {}),
    (2, 3, 16, 1, (5, 9, 7), (3, 2, 3), (1, 2, 1), (1, 0, 1), (1, 1, 1), {"kc": 64}),
    (2, 7, 15, 1, (20,), (3,), (1,), (1,), (1,), {"matrix_unit": True}),
]


@pytest.mark.parametrize(
    ("batch", "cin", "cout", "groups", "size", "kernel_size", "stride", "padding", "dilation", "changes"),
    CONV_CASES,
)
def test_conv(batch, cin, cout, groups, size, kernel_size, stride, padding, dilation, changes):
    x, w = torch.randn(batch, cin, *size), torch.randn(cout, cin // groups, *kernel_size)
    bias, scale = torch.randn(cout), torch.rand(cin)
    matrix_unit = changes.get("matrix_unit", False)
    problem = ConvProblem(
        batch, cin, cout, size, kernel_size, stride, padding, dilation, x.stride(), groups,
        precision="bf16" if matrix_unit else "strict",
    )  # fmt: skip
    schedule = replace(ConvSchedule.default(problem, WIDTH), **changes)
    out = torch.full((batch, cout, *problem.out_size), 7.0)
    each = out[0, 0].numel()
    epilogue = f"""
        float* to = y + (batch * {cout} + channel) * {each} + pos;
        for (int64_t i = 0; i < count; ++i) to[i] = acc[i] + bias[channel];
    """
    statement = emit_conv(problem, schedule, "x", "w", epilogue, "value * scale[channel]")
    run("conv", {"x": x, "w": w, "bias": bias, "scale": scale, "y": out}, statement)
    scaled = x * scale.view(-1, *[1] * len(size))
    if matrix_unit:
        scaled, w = scaled.bfloat16(), w.bfloat16()
    function = [F.conv1d, F.conv2d, F.conv3d][len(size) - 1]
    expected = function(scaled.double(), w.double(), bias.double(), stride, padding, dilation, groups)
    assert relative_error(out, expected) < 2e-6


@pytest.mark.parametrize("empty_rows", ["nan", "zero"])
def test_attention_with_bool_mask_and_rows_that_see_nothing(empty_rows):
    q, k, v = torch.randn(2, 4, 9, 24), torch.randn(2, 2, 150, 24), torch.randn(2, 2, 150, 40)
    mask = torch.rand(9, 150) < 0.5
    mask[3] = False
    out = torch.empty(2, 4, 9, 40)
    problem = AttentionProblem(
        2, 4, 2, 9, 150, 24, 40, q.stride(), k.stride(), v.stride(), 0.2,
        mask_strides=(0, 0, 150, 1), empty_rows=empty_rows,
    )  # fmt: skip
    epilogue = "for (int64_t c = 0; c < count; ++c) y[((batch * 4 + head) * 9 + row) * 40 + c] = acc[c];"
    schedule = AttentionSchedule.default(problem, WIDTH)
    statement = emit_attention(problem, schedule, "q", "k", "v", epilogue, mask="mask")
    run("attention", {"q": q, "k": k, "v": v, "mask": mask, "y": out}, statement)
    scores = q.double() @ k.double().repeat_interleave(2, 1).mT * 0.2
    weights = torch.softmax(scores.masked_fill(~mask, -torch.inf), -1)
    expected = weights @ v.double().repeat_interleave(2, 1)
    if empty_rows == "zero":
        expected = expected.nan_to_num(0)
    assert relative_error(out, expected) < 2e-6


def test_emitted_text_names_only_what_it_uses():
    problem = GemmProblem(8, 8, 8, (0, 4, 8, 1), (64, 0, 8, 1), (5, 3))
    text = emit_gemm(problem, GemmSchedule(), "x", "w", "y[row] += acc[col];")
    assert "[&](int64_t, int64_t row, int64_t col, int64_t, const float* __restrict acc) {" in text
    assert "ke::matrix(x, 8, 1, [](int64_t batch) { return (batch % 3) * 4; })" in text
    assert "ke::matrix(w, 8, 1, [](int64_t batch) { return (batch / 3) * 64; })" in text
