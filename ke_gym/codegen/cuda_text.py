"""Expressions -> CUDA C++ text: what every kernel's printer needs. Only spelling lives here.

Sources include nothing but CUDA's headers of half precision, so that NVRTC alone compiles them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from ke_gym.codegen import cpp_text, cpp_words
from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.expr import (
    Const,
    Expr,
    Index,
    Indirect,
    Interned,
    Load,
    Op,
    Position,
    Quotient,
    Remainder,
    Search,
    is_float,
    walk,
)
from ke_gym.codegen.triton_text import bare_text, enclosed

TYPES = {
    "f32": "float", "f64": "double", "bf16": "__nv_bfloat16", "f16": "__half", "bool": "bool",
    "u8": "unsigned char", "i8": "signed char", "i16": "short", "i32": "int", "i64": "long long",
}  # fmt: skip
_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "intdiv": "/", "eq": "==", "ne": "!=", "lt": "<", "le": "<=",
    "gt": ">", "ge": ">=", "and": "&&", "or": "||", "bitand": "&", "bitor": "|", "bitxor": "^", "shl": "<<",
    "shr": ">>",
}  # fmt: skip
_NARROW = ("i8", "i16", "u8")
_MATH = {
    **{name: name for name in (
        "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "tanh", "erf", "erfc", "sqrt", "rsqrt", "sin", "cos",
        "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh", "atan2", "fmod", "hypot", "pow",
        "floor", "ceil", "trunc", "copysign", "lgamma",
    )},
    "round": "rint", "abs": "fabs",
}  # fmt: skip
_WHOLE = ("floor", "ceil", "trunc", "round")
_DEVICE = "__device__ __forceinline__"

HELPERS = {
    "inf": f"""\
{_DEVICE} float inf() {{ return __int_as_float(0x7f800000); }}
""",
    "nan": f"""\
{_DEVICE} float not_a_number() {{ return __int_as_float(0x7fc00000); }}
""",
    "vector": f"""\
// N neighbours that travel as one access.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {{
  T at[N];
}};

template <int N, typename T>
{_DEVICE} Vector<T, N> load(const T* from, long long which) {{
  return reinterpret_cast<const Vector<T, N>*>(from)[which];
}}

template <int N, typename T>
{_DEVICE} void store(T* to, long long which, const Vector<T, N>& value) {{
  reinterpret_cast<Vector<T, N>*>(to)[which] = value;
}}
""",
    "larger": f"""\
// NaN wins, as in torch.
template <typename T>
{_DEVICE} T larger(T a, T b) {{ return a > b || a != a ? a : b; }}
""",
    "smaller": f"""\
// NaN wins, as in torch.
template <typename T>
{_DEVICE} T smaller(T a, T b) {{ return a < b || a != a ? a : b; }}
""",
    "Sum": f"""\
struct Sum {{
  template <typename T>
  {_DEVICE} T operator()(T a, T b) const {{ return a + b; }}
}};
""",
    "Product": f"""\
struct Product {{
  template <typename T>
  {_DEVICE} T operator()(T a, T b) const {{ return a * b; }}
}};
""",
    "Largest": f"""\
struct Largest {{
  template <typename T>
  {_DEVICE} T operator()(T a, T b) const {{ return larger(a, b); }}
}};
""",
    "Smallest": f"""\
struct Smallest {{
  template <typename T>
  {_DEVICE} T operator()(T a, T b) const {{ return smaller(a, b); }}
}};
""",
    "across_lanes": f"""\
// All lanes' values together, known to each of the LANES neighbouring threads of one of ROWS rows.
template <int LANES, int ROWS, typename T, typename Combine>
{_DEVICE} T across_lanes(T value, Combine combine) {{
  #pragma unroll
  for (int step = (LANES < 32 ? LANES : 32) / 2; step > 0; step /= 2)
    value = combine(value, T(__shfl_xor_sync(0xffffffff, value, step)));
  if constexpr (LANES > 32) {{
    constexpr int WARPS = LANES / 32;
    __shared__ T of_warp[ROWS][WARPS];
    __syncthreads();  // whoever reads the last ones is done
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.y][threadIdx.x / 32] = value;
    __syncthreads();
    value = of_warp[threadIdx.y][0];
    #pragma unroll
    for (int warp = 1; warp < WARPS; ++warp) value = combine(value, of_warp[threadIdx.y][warp]);
  }}
  return value;
}}
""",
    "down_lanes": f"""\
// The same where rows are neighbours and the lanes of a row lie ROWS threads apart.
template <int LANES, int ROWS, typename T, typename Combine>
{_DEVICE} T down_lanes(T value, Combine combine) {{
  if constexpr (LANES > 1) {{
    __shared__ T of_lane[LANES][ROWS];
    __syncthreads();  // whoever reads the last ones is done
    of_lane[threadIdx.y][threadIdx.x] = value;
    __syncthreads();
    value = of_lane[0][threadIdx.x];
    #pragma unroll
    for (int lane = 1; lane < LANES; ++lane) value = combine(value, of_lane[lane][threadIdx.x]);
  }}
  return value;
}}
""",
    "scan_lanes": f"""\
// The value of this lane and all before it, and in `total` that of all LANES lanes.
template <int LANES, int ROWS, typename T, typename Combine>
{_DEVICE} T scan_lanes(T value, T identity, Combine combine, T& total) {{
  constexpr int WIDTH = LANES < 32 ? LANES : 32;
  const int lane = threadIdx.x % WIDTH;
  #pragma unroll
  for (int step = 1; step < WIDTH; step *= 2) {{
    const T before = __shfl_up_sync(0xffffffff, value, step, WIDTH);
    if (lane >= step) value = combine(before, value);
  }}
  total = __shfl_sync(0xffffffff, value, WIDTH - 1, WIDTH);
  if constexpr (LANES > 32) {{
    constexpr int WARPS = LANES / 32;
    __shared__ T of_warp[ROWS][WARPS];
    __syncthreads();  // whoever reads the last ones is done
    if (lane == 0) of_warp[threadIdx.y][threadIdx.x / 32] = total;
    __syncthreads();
    T before = identity;
    total = identity;
    #pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) {{
      if (warp == threadIdx.x / 32) before = total;
      total = combine(total, of_warp[threadIdx.y][warp]);
    }}
    value = combine(before, value);
  }}
  return value;
}}
""",
    "search": f"""\
// How many of the ascending row[0:SIZE] are below value (or at most, if RIGHT), probed where torch does.
template <int SIZE, bool RIGHT, typename Row, typename T>
{_DEVICE} long long search(const Row* row, T value) {{
  int first = 0, last = SIZE;
  while (first < last) {{
    const int middle = first + (last - first) / 2;
    const T probe = T(row[middle]);
    if (RIGHT ? !(probe > value) : !(probe >= value)) first = middle + 1;
    else last = middle;
  }}
  return first;
}}
""",
    "search_here": f"""\
// The same, all in so many steps, for a row in shared memory; row[SIZE] is read as well.
template <int SIZE, bool RIGHT, typename Row, typename T>
{_DEVICE} long long search_here(const Row* row, T value) {{
  constexpr bool FULL = (SIZE & (SIZE + 1)) == 0;
  int first = 0, last = SIZE;
  #pragma unroll
  for (int left = SIZE; left > 0; left /= 2) {{
    const bool open = FULL || first < last;
    const int middle = first + (last - first) / 2;
    const T probe = T(row[middle]);
    const bool beyond = RIGHT ? !(probe > value) : !(probe >= value);
    if (open && beyond) first = middle + 1;
    if (!beyond) last = middle;
  }}
  return first;
}}
""",
    "probed": f"""\
// Which element a search among SIZE probes at this node of its tree: 0 is the root, i's children are 2 i + 1 and 2 i + 2.
template <int SIZE>
{_DEVICE} int probed(int node) {{
  int first = 0, last = SIZE, level = 0;
  while ((node + 1) >> (level + 1)) ++level;
  while (level-- > 0) {{
    const int middle = first + (last - first) / 2;
    if ((node + 1) >> level & 1) first = middle + 1;
    else last = middle;
  }}
  return first + (last - first) / 2;
}}
""",
    "descend": f"""\
// As search, with the first LEVELS probes among the tree's upper nodes.
template <int SIZE, int LEVELS, bool RIGHT, typename Row, typename T>
{_DEVICE} long long descend(const Row* nodes, const Row* row, T value) {{
  static_assert(SIZE >= (1 << LEVELS) - 1, "all of these levels are full");
  int first = 0, last = SIZE, node = 0;
  #pragma unroll
  for (int level = 0; level < LEVELS; ++level) {{
    const int middle = first + (last - first) / 2;
    const T probe = T(nodes[node]);
    const bool beyond = RIGHT ? !(probe > value) : !(probe >= value);
    node = 2 * node + 1 + beyond;
    if (beyond) first = middle + 1;
    else last = middle;
  }}
  #pragma unroll
  for (int left = SIZE >> LEVELS; left > 0; left /= 2) {{
    if (first < last) {{
      const int middle = first + (last - first) / 2;
      const T probe = T(row[middle]);
      if (RIGHT ? !(probe > value) : !(probe >= value)) first = middle + 1;
      else last = middle;
    }}
  }}
  return first;
}}
""",
    "sigmoid": f"""\
template <typename T>
{_DEVICE} T sigmoid(T x) {{ return T(1) / (T(1) + exp(-x)); }}
""",
    "silu": f"""\
template <typename T>
{_DEVICE} T silu(T x) {{ return x / (T(1) + exp(-x)); }}
""",
    "gelu": f"""\
template <typename T>
{_DEVICE} T gelu(T x) {{ return T(0.5) * x * (T(1) + erf(x * T(0.7071067811865476))); }}
""",
    "gelu_tanh": f"""\
template <typename T>
{_DEVICE} T gelu_tanh(T x) {{
  return T(0.5) * x * (T(1) + tanh(T(0.7978845608028654) * (x + T(0.044715) * x * x * x)));
}}
""",
    "floordiv": f"""\
template <typename T>
{_DEVICE} T floordiv(T a, T b) {{ return a / b - (a % b != 0 && (a < 0) != (b < 0)); }}
""",
    "modulo": f"""\
// As torch.remainder: the sign of the divisor.
template <typename T>
{_DEVICE} T modulo(T a, T b) {{
  const T rest = a % b;
  return rest != 0 && (rest < 0) != (b < 0) ? rest + b : rest;
}}
""",
    "float_modulo": f"""\
// As torch.remainder: the sign of the divisor.
template <typename T>
{_DEVICE} T float_modulo(T a, T b) {{
  const T rest = fmod(a, b);
  return rest != 0 && (rest < 0) != (b < 0) ? rest + b : rest;
}}
""",
    "power": f"""\
template <typename T>
{_DEVICE} T power(T base, T exponent) {{
  if (exponent < 0) return base == 1 ? 1 : base == -1 ? (exponent % 2 ? -1 : 1) : 0;
  T result = 1;
  for (; exponent; exponent >>= 1, base *= base) result *= exponent & 1 ? base : 1;
  return result;
}}
""",
}
_NEEDS = {"Largest": "larger", "Smallest": "smaller"}


def helpers(used: set[str]) -> list[str]:
    """The text of the helpers that are used, each after what it needs."""
    wanted = used | {_NEEDS[name] for name in used if name in _NEEDS}
    return [text for name, text in HELPERS.items() if name in wanted]


def cast(dtype: str, text: str) -> str:
    """``text`` converted; rounded to nearest where that is what floats do."""
    kind = TYPES[dtype]
    return f"{kind}({bare_text(text)})" if " " not in kind else f"({kind})({bare_text(text)})"


class Text(cpp_text.Text):
    """Prints expressions; loads and what is used more than once become named constants, guarded ones stay so.

    ``pointers``: what the kernel calls its tensors.
    """

    def __init__(self, used: set[str], sizes: Mapping[str, int], pointers: Mapping[str, str]) -> None:
        super().__init__(used, sizes)
        self.pointers = pointers

    def literal(self, value: float | int | bool, dtype: str) -> str:
        if dtype == "i64":
            return "(-9223372036854775807LL - 1)" if value == -(2**63) else f"{int(value)}LL"
        if dtype in ("f16", "bf16"):
            return f"{TYPES[dtype]}({self.literal(value, 'f32')})"
        if dtype == "i32" and value == -(2**31):
            return "(-2147483647 - 1)"
        value = cpp_words.representable(value, dtype)
        if is_float(dtype) and not math.isfinite(value):
            self.used.add("nan" if math.isnan(value) else "inf")
            text = "not_a_number()" if math.isnan(value) else "inf()" if value > 0 else "-inf()"
            return text if dtype == "f32" else f"double({text})"
        return cpp_words.literal(value, dtype)

    def _atom(self, atom: Interned) -> str:
        if isinstance(atom, Indirect):
            text = self.expr(atom.value)
            return text if atom.value.dtype == "i64" else f"(long long)({bare_text(text)})"
        if isinstance(atom, Quotient):
            symbol = "%" if isinstance(atom, Remainder) else "/"
            return f"({enclosed(self.index(atom.index))} {symbol} {atom.divisor})"
        return super()._atom(atom)

    def element(self, buffer: str, index: Index) -> str:
        """The tensor's element, as C++ names it."""
        return f"{self.pointers[buffer]}[{bare_text(self.index(index))}]"

    def _print(self, expr: Expr) -> str:
        if isinstance(expr, Const):
            return self.literal(expr.value, expr.dtype)
        if isinstance(expr, Load):
            return self.element(expr.buffer, expr.index[0])
        if isinstance(expr, Position):
            return cast(expr.dtype, self.index(expr.index))
        if isinstance(expr, Search):
            found = self.found(expr, "true" if expr.right else "false", bare_text(self.expr(expr.value)))
            return found if expr.dtype == "i64" else cast(expr.dtype, found)
        return super()._print(expr)

    def found(self, search: Search, right: str, value: str) -> str:
        """The call that searches for ``value``."""
        self.used.add("search")
        return f"search<{search.size}, {right}>({self.row(search)}, {value})"

    def row(self, search: Search) -> str:
        """Where in memory the row begins that is searched in."""
        pointer, start = self.pointers[search.buffer], self.index(search.start[0])
        return pointer if start == "0" else f"{pointer} + {start}"

    def _op(self, expr: Op) -> str:
        name, kind, source = expr.name, expr.dtype, expr.args[0].dtype
        args = [self.expr(a) for a in expr.args]
        if name == "cast":
            return f"({args[0]} != 0)" if kind == "bool" else cast(kind, args[0])
        if name == "where":
            return f"({args[0]} ? {args[1]} : {args[2]})"
        if kind == "bool" and name in ("max", "min", "add", "mul"):
            return f"({args[0]} {'||' if name in ('max', 'add') else '&&'} {args[1]})"
        if name in _INFIX:
            text = f"({args[0]} {_INFIX[name]} {args[1]})"
            return cast(kind, text) if kind in _NARROW and name in ("add", "sub", "mul", "shl") else text
        if name == "fmod" and not is_float(kind):
            return cast(kind, f"({args[0]} % {args[1]})")
        if name in ("neg", "not", "bitnot"):
            operand = f"({args[0]})" if args[0].startswith("-") else args[0]
            text = f"({ {'neg': '-', 'not': '!', 'bitnot': '~'}[name] }{operand})"
            return cast(kind, text) if kind in _NARROW else text
        if name == "sign":
            return cast(kind, f"(({args[0]} > 0) - ({args[0]} < 0))")
        if name == "abs" and not is_float(kind):
            return cast(kind, f"({args[0]} < 0 ? -{args[0]} : {args[0]})")
        if name in _WHOLE and not is_float(source):
            return args[0]
        return self._function(name, kind, args)

    def _function(self, name: str, kind: str, args: list[str]) -> str:
        bare = ", ".join(bare_text(a) for a in args)
        if name in ("max", "min"):
            helper = "larger" if name == "max" else "smaller"
            self.used.add(helper)
            return f"{helper}<{TYPES[kind]}>({bare})"
        if name == "floordiv" and is_float(kind):
            return f"{self._spelled('floor', kind)}({args[0]} / {args[1]})"
        if name in ("floordiv", "remainder") or (name == "pow" and not is_float(kind)):
            helper = {"floordiv": "floordiv", "pow": "power", "remainder": "modulo"}[name]
            helper = f"float_{helper}" if is_float(kind) else helper
            self.used.add(helper)
            return f"{helper}<{TYPES[kind]}>({bare})"
        if name in ("sigmoid", "silu", "gelu", "gelu_tanh"):
            self.used.add(name)
            return f"{name}({bare})"
        if name in _MATH:
            return f"{self._spelled(name, kind)}({bare})"
        raise Illegal(f"{name} has no spelling in CUDA C++")

    @staticmethod
    def _spelled(name: str, kind: str) -> str:
        return f"{_MATH[name]}f" if kind == "f32" else _MATH[name]

    def _accumulated(self, node: Op) -> list[str]:
        """A long chain as one statement per term."""
        first, *rest = cpp_text.chain_of(node)
        name = self._fresh()
        lines = [f"{TYPES[node.dtype]} {name} = {bare_text(self.expr(first))};"]
        for term in rest:
            if node.name in ("max", "min"):
                value = self._function(node.name, node.dtype, [name, self.expr(term)])
                lines.append(f"{name} = {value};")
            else:
                lines.append(f"{name} {_INFIX[node.name]}= {bare_text(self.expr(term))};")
        self.names[node] = name
        return lines

    def pending(self, roots: Sequence[Expr]) -> list[Interned]:
        """What is still to be computed for ``roots``, operands first: names end the search."""
        seen: dict[Interned, None] = {}

        def visit(node: Interned) -> None:
            if node not in seen and node not in self.names:
                for operand in cpp_text.operands_of(node):
                    visit(operand)
                seen[node] = None

        for root in roots:
            visit(root)
        return list(seen)

    def bind(self, roots: Sequence[Expr], called: Mapping[Expr, str] | None = None) -> list[str]:
        """Declarations of loads, and of what several places use, as far as it is safe to compute always."""
        safe, _ = self.safe(roots)
        pending = self.pending(roots)
        uses = Counter(child for node in pending for child in cpp_text.operands_of(node))
        chained = {n for root in roots for n in cpp_text.chains_in(root)}
        lines = []
        for node in pending:
            if node not in safe or not isinstance(node, (Op, Load, Search)):
                continue
            if isinstance(node, Op) and node in chained:
                lines.extend(self._accumulated(node))
                continue
            if isinstance(node, Op) and (uses[node] < 2 or constant(node)):
                continue
            text, name = self._print(node), self._fresh()
            lines.append(f"const {TYPES[node.dtype]} {name} = {bare_text(text)};")
            self.names[node] = name
        return lines


def constant(expr: Interned) -> bool:
    return all(isinstance(n, (Op, Const)) for n in walk(expr))
