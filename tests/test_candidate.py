from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ke_gym.candidate import Candidate, normalize, normalize_cpp
from ke_gym.errors import UserError

MODULE = '''
import torch
from ke_gym import lang

kernels = lang.cpp(r"""
extern "C" void twice(const float* x, float* out, int64_t n) {
  #pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = 2 * x[i];
}
""")


def forward(x):
    out = torch.empty_like(x)
    kernels.twice(x, out, x.numel())
    return out
'''


def test_comments_docstrings_and_formatting_do_not_change_the_id() -> None:
    same = MODULE.replace("import torch\n", '"""A kernel."""\n# imports\nimport torch\n')
    same = same.replace("def forward(x):\n", 'def forward( x ):\n    """Twice x."""\n\n')
    same = same.replace("2 * x[i];", "2 * x[ i ]; // twice\n /* done\n */")
    same = same.replace("  for (int64_t i = 0; i < n; ++i) out", "for(int64_t i=0; i<n; ++i)\n      out")
    assert same != MODULE
    assert normalize(same) == normalize(MODULE)
    assert Candidate(same).id == Candidate(MODULE).id


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("2 * x", "3 * x"),
        ("#pragma omp simd", ""),
        ("x.numel()", "x.numel() - 1"),
        ("float* out", "double* out"),
    ],
)
def test_what_the_module_does_changes_the_id(old: str, new: str) -> None:
    assert Candidate(MODULE.replace(old, new)).id != Candidate(MODULE).id


def test_the_language_is_part_of_the_id_and_the_origin_is_not() -> None:
    assert Candidate(MODULE, "other").id != Candidate(MODULE).id
    assert Candidate(MODULE, parent="p", strategy="vectorize", proposer="rewriter").id == Candidate(MODULE).id


def test_a_source_that_does_not_parse_still_has_an_id() -> None:
    broken = "def forward(x:\n    return x\n"
    assert Candidate(broken).id == Candidate(f"\n{broken}\n\n").id
    assert Candidate(broken).id != Candidate("def forward(y:\n    return x\n").id


def test_from_file(tmp_path: Path) -> None:
    path = tmp_path / "kernel.py"
    path.write_text(MODULE)
    assert Candidate.from_file(path) == Candidate(MODULE)
    path.write_bytes(b"\xef\xbb\xbf" + MODULE.encode())  # a byte order mark
    assert Candidate.from_file(path) == Candidate(MODULE)
    with pytest.raises(UserError, match=r"nothing\.py: cannot be read"):
        Candidate.from_file(tmp_path / "nothing.py")


def test_strings_that_look_like_comments_are_kept() -> None:
    assert normalize_cpp('f("// no  comment"); // one') == 'f("// no  comment");'
    assert normalize_cpp("a\n#define X \\\n  (1)\nb  c") == "a\n#define X (1)\nb c"
    assert normalize_cpp("a + +b") != normalize_cpp("a ++ b")


@given(st.text(alphabet="ab+-(){};,#\n \t", max_size=60), st.text(alphabet=" \n\t", min_size=1, max_size=3))
def test_blanks_at_line_ends_never_matter(source: str, blanks: str) -> None:
    assert normalize_cpp(source + blanks) == normalize_cpp(source)
    assert normalize_cpp(normalize_cpp(source)) == normalize_cpp(source)


@given(st.text(max_size=100))
def test_any_text_has_an_id(source: str) -> None:
    assert len(Candidate(source).id) == 16
