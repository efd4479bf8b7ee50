from __future__ import annotations

import ast
from concurrent.futures import ThreadPoolExecutor

import pytest

from ke_gym import syntax


def test_many_threads_may_parse_at_once() -> None:
    sources = [f"x = {'(' * depth}1{')' * depth}\n" * 40 for depth in range(1, 33)]
    expected = [ast.dump(ast.parse(source)) for source in sources]
    with ThreadPoolExecutor(8) as pool:
        parsed = list(pool.map(syntax.parse, sources * 4))
    assert [ast.dump(tree) for tree in parsed] == expected * 4
    with pytest.raises(SyntaxError):
        syntax.parse("x = (")
