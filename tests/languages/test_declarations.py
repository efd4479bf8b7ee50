from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ke_gym.languages.declarations import parse

SOURCE = r"""
#include <cstdint>
// extern "C" void commented(int a) {}
const char* text = "extern \"C\" void quoted(int a) {}";
#define MACRO(name) extern "C" void name() {}
extern "C" void rows(const float* __restrict__ x, float *out, int64_t r,
                     const std::int64_t n = 3) {
  if (r) { out[0] = x[0]; }
}
extern "C" {
static inline float helper(float a) { return a; }
void block(ke::half const* h, ke::bf16 y[], unsigned char *const u, size_t n, long long k, bool) noexcept
{
}
void declared(int);
struct P { int a; };
__attribute__((noinline)) void nothing(void) { const char* s = "}"; }
}
void plain(int a) {}
extern "C" void odd(float** p, const void* v, Foo f) {}
"""


def test_finds_definitions_alone_and_in_blocks() -> None:
    found = parse(SOURCE)
    assert list(found) == ["rows", "helper", "block", "nothing", "odd"]
    assert found["rows"].lines == (6, 9)
    assert found["helper"].returns == "float"
    assert [(p.name, p.ctype) for p in found["rows"].parameters] == [
        ("x", "const float*"),
        ("out", "float*"),
        ("r", "int64_t"),
        ("n", "int64_t"),
    ]
    assert [(p.name, p.ctype) for p in found["block"].parameters] == [
        ("h", "const half*"),
        ("y", "bf16*"),
        ("u", "uint8_t*"),
        ("n", "uint64_t"),
        ("k", "int64_t"),
        ("argument6", "bool"),
    ]
    assert found["nothing"].parameters == ()
    assert [p.writes for p in found["rows"].parameters] == [False, True, False, False]


def test_what_cannot_be_passed_says_so() -> None:
    problems = [p.problem for p in parse(SOURCE)["odd"].parameters]
    assert [p.split(" is ")[0] for p in problems] == [
        "type 'float** p'",
        "type 'const void* v'",
        "type 'Foo f'",
    ]


SPELLINGS = {
    "float": "float",
    "double": "double",
    "int": "int32_t",
    "long": "int64_t",
    "std::int8_t": "int8_t",
    "short": "int16_t",
    "unsigned char": "uint8_t",
    "bool": "bool",
}


@given(
    st.lists(
        st.tuples(
            st.sampled_from(sorted(SPELLINGS)), st.booleans(), st.booleans(), st.sampled_from([" ", "\n\t"])
        ),
        max_size=6,
    )
)
def test_any_declaration_of_known_types(parameters: list[tuple[str, bool, bool, str]]) -> None:
    texts = [
        f"{'const ' if const else ''}{base}{gap}{'* ' if pointer else ''}a{i}"
        for i, (base, pointer, const, gap) in enumerate(parameters)
    ]
    (kernel,) = parse(f'extern "C" void f({", ".join(texts)}) {{ }}').values()
    expected = [
        f"{'const ' if const and pointer else ''}{SPELLINGS[base]}{'*' if pointer else ''}"
        for base, pointer, const, _ in parameters
    ]
    assert [p.ctype for p in kernel.parameters] == expected
    assert [p.name for p in kernel.parameters] == [f"a{i}" for i in range(len(parameters))]
    assert not any(p.problem for p in kernel.parameters)


@given(st.text(alphabet='extern "C"void f(){};*,/\n#', max_size=120))
def test_parsing_never_fails(source: str) -> None:
    assert isinstance(parse(source), dict)


@pytest.mark.parametrize(
    "source", ['extern "C"', 'extern "C" {', 'extern "C" void f(', 'extern "C" void f() {']
)
def test_cut_off_sources(source: str) -> None:
    assert set(parse(source)) <= {"f"}
