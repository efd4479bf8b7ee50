"""How C++ spells types, literals, stores and the steps of a reduction."""

from __future__ import annotations

import math

from ke_gym.codegen.expr import compute_dtype, is_float

TYPES = {
    "f32": "float", "f64": "double", "bf16": "ke::bf16", "f16": "ke::half", "bool": "bool", "u8": "uint8_t",
    "i8": "int8_t", "i16": "int16_t", "i32": "int32_t", "i64": "int64_t",
}  # fmt: skip
LARGEST_FLOAT = 3.4028235e38
_IDENTITY = {"sum": 0, "prod": 1, "any": False, "all": True}
COMBINE = {"sum": "+", "prod": "*", "any": "||", "all": "&&", "max": "max", "min": "min"}
_LOWEST = {"i8": -128, "i16": -(2**15), "i32": -(2**31), "i64": -(2**63), "u8": 0, "bool": 0}
_GREATEST = {"i8": 127, "i16": 2**15 - 1, "i32": 2**31 - 1, "i64": 2**63 - 1, "u8": 255, "bool": 1}

HELPERS = {
    "search": """\
// How many of the ascending row[0..left) are below value (or at most, if RIGHT). As many probes for every value
// and no branch, so that the compiler lets a vector of searches run at once; they probe where torch does, so that
// NaN among the boundaries or as value gives what torch gives.
template <int64_t MOST, bool RIGHT, typename Row, typename T>
static inline __attribute__((always_inline)) int64_t search(
    const Row* row, T value, int64_t first = 0, int64_t left = MOST) {
  if constexpr (MOST == 0) {
    return first;
  } else {
    const bool some = MOST > 1 || left > 0;  // only the last probe may find nothing left
    const int64_t half = left >> 1;
    const Row probed = row[some ? first + half : 0];
    const int64_t beyond = some & (RIGHT ? !(probed > value) : !(probed >= value)) ? 1 : 0;
    return search<MOST / 2, RIGHT>(row, value, first + (-beyond & (half + 1)), half - (beyond & ~left & 1));
  }
}
""",
    "floordiv": """\
template <typename T>
static inline T floordiv(T a, T b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }
""",
    "remainder": """\
// As torch.remainder: the sign of the divisor.
template <typename T>
static inline T remainder(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    const T r = std::fmod(a, b);
    return r != 0 && (r < 0) != (b < 0) ? r + b : r;
  } else {
    const T r = a % b;
    return r != 0 && (r < 0) != (b < 0) ? r + b : r;
  }
}
""",
    "power": """\
template <typename T>
static inline T power(T base, T exponent) {
  if (exponent < 0) return base == 1 ? 1 : base == -1 ? (exponent % 2 ? -1 : 1) : 0;
  T result = 1;
  for (; exponent; exponent >>= 1, base *= base) result *= exponent & 1 ? base : 1;
  return result;
}
""",
}


def representable(value: float, dtype: str) -> float:
    """The number, infinite where fp32 has none as large."""
    return math.copysign(math.inf, value) if dtype == "f32" and abs(value) > LARGEST_FLOAT else value


def literal(value: float | int | bool, dtype: str) -> str:
    if dtype == "bool":
        return "true" if value else "false"
    if not is_float(dtype):
        if value == -(2**63):
            return "INT64_MIN"  # minus a literal would be minus one that is too large
        return str(int(value)) if abs(int(value)) < 2**31 else f"INT64_C({int(value)})"
    value = representable(float(value), dtype)
    if math.isnan(value):
        return "ke::nan" if dtype == "f32" else "(double)ke::nan"
    if math.isinf(value):
        text = "ke::inf" if dtype == "f32" else "(double)ke::inf"
        return text if value > 0 else f"-{text}"
    text = repr(value)
    if dtype == "f32":
        import numpy

        text = str(numpy.float32(value))
        text = text if any(c in text for c in ".en") else f"{text}.0"
        return f"{text}f"
    return text


def identity(op: str, dtype: str) -> str:
    if op in ("max", "min"):
        if is_float(dtype):
            return literal(-math.inf if op == "max" else math.inf, dtype)
        return literal((_LOWEST if op == "max" else _GREATEST)[dtype], dtype)
    return literal(_IDENTITY[op], dtype)


def combine(op: str, a: str, b: str) -> str:
    symbol = COMBINE[op]
    return f"ke::{symbol}({a}, {b})" if symbol in ("max", "min") else f"{a} {symbol} {b}"


def accumulate(op: str, target: str, value: str) -> str:
    symbol = COMBINE[op]
    if symbol in ("+", "*"):
        return f"{target} {symbol}= {value};"
    return f"{target} = {combine(op, target, value)};"


def notes_nan(op: str | None, dtype: str) -> bool:
    """Whether a reduction in a register keeps NaN in a flag of its own: the extreme itself is one instruction."""
    return op in ("max", "min") and is_float(dtype)


def accumulate_extreme(op: str, target: str, flag: str, value: str) -> str:
    """Takes ``value`` into the running extreme ``target`` and notes in ``flag`` if it is NaN."""
    return f"ke::take_{op}({target}, {flag}, {value});"


def extreme(flag: str, value: str, dtype: str) -> str:
    return f"{flag} ? {literal(math.nan, dtype)} : {value}"


def store_text(text: str, dtype: str, value_dtype: str) -> str:
    return text if compute_dtype(dtype) == value_dtype else f"({TYPES[dtype]})({text})"


def offset_from(pointer: str, index: str) -> str:
    return pointer if index == "0" else f"{pointer} + {index}"


def bare_text(text: str) -> str:
    """Without the outer parentheses, where a whole right-hand side stands."""
    if not (text.startswith("(") and text.endswith(")")):
        return text
    depth = 0
    for k, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0 and k < len(text) - 1:
            return text
    return text[1:-1]
