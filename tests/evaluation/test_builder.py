from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from ke_gym.errors import UserError
from ke_gym.evaluation import builder as builder_module
from ke_gym.evaluation.builder import Builder
from ke_gym.evaluation.zygote import Zygote
from ke_gym.languages import cpp
from ke_gym.languages.artifact import Artifact
from ke_gym.languages.base import BuildError, Signature
from ke_gym.languages.plan import TensorSpec

SPEC = TensorSpec((8, 8), (8, 1), "float32")
SIGNATURE = Signature(
    "t", {"cpu": (SPEC,)}, {"cpu": (SPEC,)}, {"cpu": {}}, {"cpu": {}}, {"cpu": ()}
).to_bytes()


def module(kernel: str = "for (int64_t i = 0; i < n; i++) out[i] = x[i];", head: str = "") -> str:
    return f'''
import torch
from ke_gym import lang
{head}
kernels = lang.cpp(r"""
#include <cstdint>
extern "C" void copy(const float* x, float* out, int64_t n) {{ {kernel} }}
""")
def forward(x):
    out = torch.empty_like(x)
    kernels.copy(x, out, x.numel())
    return out
'''


@pytest.fixture
def builder(zygote: Zygote, tmp_path: Path) -> Builder:
    return Builder(zygote, tmp_path / "cache")


def fails(builder: Builder, source: str, timeout: float = 600.0) -> BuildError:
    with pytest.raises(BuildError) as failure:
        builder.build(source, SIGNATURE, timeout=timeout)
    return failure.value


def test_a_module_becomes_an_artifact_and_is_kept(builder: Builder, tmp_path: Path) -> None:
    built = builder.build(module(), SIGNATURE)
    assert built.lane == "plan" and list(built.plans) == ["cpu"] and len(built.binaries) == 1
    (kept,) = (tmp_path / "cache").iterdir()
    modified = kept.stat().st_mtime_ns
    again = builder.build(module(), SIGNATURE)
    assert again.binary_id == built.binary_id and kept.stat().st_mtime_ns == modified


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_damaged_cache_entry_is_built_again(builder: Builder, tmp_path: Path, damage: bytes | None) -> None:
    built = builder.build(module(), SIGNATURE)
    (kept,) = (tmp_path / "cache").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-1] + b"?" if damage is None else damage)
    assert builder.build(module(), SIGNATURE).binary_id == built.binary_id
    assert Artifact.from_bytes(kept.read_bytes().split(b"\n", 1)[1]).binary_id == built.binary_id


def test_what_the_compiler_refuses_is_told(builder: Builder, tmp_path: Path) -> None:
    failure = fails(builder, module("out[0] = undeclared;"))
    assert failure.outcome == "compile" and "undeclared" in failure.log
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("head", "outcome", "message"),
    [
        ("import os; os._exit(0)", "compile", "exit code 0"),
        ("import ctypes; ctypes.string_at(0)", "compile", "SIGSEGV"),
        ("while True: pass", "timeout", "longer than 2 s"),
        ("block = bytearray(1 << 36)", "compile", "emory"),
        ("import os; os.write(3, b'forged' * 100)", "compile", "nonsense"),
        ("from ke_gym.errors import UserError; raise UserError('not yours')", "compile", "not yours"),
    ],
)
def test_hostile_modules_end_with_a_typed_failure(
    builder: Builder, head: str, outcome: str, message: str
) -> None:
    failure = fails(builder, module(head=head), timeout=2.0 if outcome == "timeout" else 600.0)
    assert failure.outcome == outcome and message in failure.log


def test_a_build_that_hangs_up_and_goes_on_is_killed(
    builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder_module, "END_SECONDS", 0.5)
    failure = fails(builder, "import os, time\nos.closerange(3, 64)\ntime.sleep(99)\n")
    assert failure.outcome == "compile" and "went on" in failure.log


def test_no_module_can_blame_the_user(builder: Builder) -> None:
    raised = (
        "from ke_gym.errors import UserError\ndef __getattr__(name):\n    raise UserError('broken task')\n"
    )
    assert fails(builder, raised).outcome in ("compile", "constraints")
    forged = """
import gc, os
for thing in gc.get_objects():
    if type(thing).__name__ == "Channel":
        thing.send({"user_error": "broken task"})
        os._exit(0)
"""
    assert fails(builder, forged).outcome == "compile"


def test_an_unknown_language_is_the_users_mistake(builder: Builder) -> None:
    with pytest.raises(UserError, match="did you mean 'cpp'"):
        builder.build(module(), SIGNATURE, language="cppp")


def test_what_was_built_with_other_headers_is_built_again(
    builder: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key() -> tuple[str, str]:
        cpp.environment_id.cache_clear()
        builder_module._toolchain.cache_clear()
        return builder._key(module(), SIGNATURE, "cpp", {}), cpp.environment_id()

    before = key()
    headers = tmp_path / "include"
    shutil.copytree(cpp.INCLUDE, headers)
    with monkeypatch.context() as patch:
        patch.setattr(cpp, "INCLUDE", headers)
        assert key() == before
        header = headers / "ke" / "math.h"
        header.write_text(header.read_text() + "// changed\n")
        changed = key()
        assert changed[0] != before[0] and changed[1] != before[1]
        patch.setattr(cpp, "CODE_FLAGS", (*cpp.CODE_FLAGS, "-g"))
        assert key()[0] not in (before[0], changed[0])
    assert key() == before


def test_a_compiler_that_does_not_end_is_killed(builder: Builder) -> None:
    tree = """template <int N, int M = 0> struct F {
  static constexpr int v = F<N - 1, 2 * M>::v + F<N - 1, 2 * M + 1>::v;
};
template <int M> struct F<0, M> { static constexpr int v = 1; };
extern"""
    bomb = module("out[0] = F<40>::v;").replace("extern", tree, 1)
    failure = fails(builder, bomb, timeout=2.0)
    assert failure.outcome in ("timeout", "compile")


def test_the_compiler_cannot_read_what_it_should_not(builder: Builder, tmp_path: Path) -> None:
    secret = tmp_path / "secret.h"
    secret.write_text("#define SECRET 1\n")
    failure = fails(
        builder, module().replace("#include <cstdint>", f'#include <cstdint>\n#include "{secret}"')
    )
    assert failure.outcome == "compile" and "No such file" in failure.log


def test_several_builds_may_be_in_flight(builder: Builder) -> None:
    sources = [module(f"for (int64_t i = 0; i < n; i++) out[i] = x[i] + {i};") for i in range(4)]
    found: dict[int, Artifact] = {}
    threads = [
        threading.Thread(target=lambda i=i, s=s: found.update({i: builder.build(s, SIGNATURE)}))
        for i, s in enumerate(sources)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({artifact.binary_id for artifact in found.values()}) == 4
