"""The command line with a language model: real processes, real HTTP, a real evaluation, a planted key."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ke_gym.candidate import Candidate
from ke_gym.errors import UserError
from ke_gym.evaluation import evaluator as evaluator_module
from ke_gym.evaluation.evaluator import Evaluator
from ke_gym.evaluation.zygote import Zygote
from ke_gym.tasks import Task
from ke_gym.testing.rewriter_endpoint import MODEL, RewriterEndpoint
from tests.machine import give_peaks
from tests.proposers.llm import KEY
from tests.scripts.command import ROOT
from tests.scripts.test_optimize import TASK


def optimize(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(ROOT / "scripts" / "optimize.py"), *arguments, "--out", str(folder / "runs")]
    kept = {k: v for k, v in os.environ.items() if not k.startswith("OPENAI_")}
    env = kept | {"KE_GYM_HOME": str(folder), "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(line, env=env, cwd=folder, capture_output=True, text=True, timeout=900)


@pytest.fixture
def task(tmp_path: Path) -> Path:
    give_peaks(tmp_path)
    path = tmp_path / "chain.py"
    path.write_text(TASK)
    return path


def test_a_search_with_a_model_from_the_command_line(tmp_path: Path, task: Path) -> None:
    tape, prices = str(tmp_path / "talk.jsonl"), tmp_path / "prices.json"
    prices.write_text(json.dumps({MODEL: [1.0, 4.0]}))
    options = ("--budget", "3", "--proposer", "rewriter,openai", "--model", MODEL, "--max-dollars", "0.5")
    tracked = importlib.util.find_spec("wandb") is not None
    options += ("--wandb", "offline", "--no-use-knowledge") if tracked else ("--no-use-knowledge",)
    with RewriterEndpoint(key=KEY, tasks={"chain": Task.from_file(task)}) as server:
        done = optimize(
            tmp_path, str(task), *options, "--prices", str(prices), "--record", tape,
            OPENAI_API_KEY=KEY, OPENAI_BASE_URL=server.url,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert server.calls >= 1
    folders = {path.name: path for path in (tmp_path / "runs").iterdir()}
    assert ("wandb" in folders) is tracked
    (run,) = (path for name, path in folders.items() if name != "wandb")
    result = json.loads((run / "result.json").read_text())
    assert 0 < result["dollars"] < 0.5 and result["usage"]["calls"] >= 1
    assert "What models were asked" in (run / "report.html").read_text()
    talks = [path.read_text() for path in (run / "transcripts").glob("*.md")]
    assert talks and not any("# Notes that may help" in talk for talk in talks) and Path(tape).exists()
    assert KEY not in done.stdout + done.stderr
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path


def test_no_sandbox_sees_the_key(tmp_path: Path, task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(evaluator_module, "Zygote", Zygote)  # one that starts with the key around
    look = Candidate(
        "import os\nraise RuntimeError(repr(dict(os.environ)) + open('/proc/self/environ').read())"
    )
    environ = Candidate("import os\nraise RuntimeError(repr(dict(os.environ)))")
    with Evaluator(Task.from_file(task), folder=tmp_path) as evaluator:
        logs = [evaluator.evaluate(candidate).log for candidate in (look, environ)]
    assert "PATH" in logs[1]
    assert not any(KEY in log or "OPENAI" in log for log in logs)


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # tyro and dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        ({"model": "m"}, {}, r"set OPENAI_API_KEY.*rewriter, which needs neither"),
        ({}, {"OPENAI_API_KEY": KEY}, "name one with --model"),
        ({"model": "m"}, {"OPENAI_BASE_URL": "http://127.0.0.1:9/v1"}, "cannot be reached"),
        ({"model": "m"}, {"OPENAI_BASE_URL": "here"}, "no http address"),
        ({"model": "m", "replay": "nowhere.jsonl"}, {}, "cannot be read"),
        ({"model": "m", "max_dollars": -1.0}, {}, "buys nothing"),
        (
            {"model": "gpt-5", "max_dollars": 0.1},
            {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": "https://api.example.com/v1"},
            r"one answer of gpt-5 may cost \$0\.1600",
        ),
        (
            {"model": "unheard-of", "max_dollars": 1.0},
            {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": "https://api.example.com/v1"},
            "--prices FILE",
        ),
        ({"model": "m", "knowledge": ("/nowhere",)}, {"OPENAI_API_KEY": KEY}, "nowhere"),
        ({"model": "m", "proposer": "openai,opemai"}, {}, "did you mean 'openai'"),
        ({"model": "m", "proposer": "openai,openai"}, {}, "one twice"),
    ],
    ids=[
        "key",
        "model",
        "unreachable",
        "address",
        "cassette",
        "dollars",
        "poor",
        "price",
        "knowledge",
        "proposer",
        "twice",
    ],
)
def test_bad_input_is_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: dict[str, Any],
    environment: dict[str, str],
    said: str,
) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    optimizer = script("optimize")
    given = {"tasks": ("softmax",), "proposer": "openai", "out": tmp_path / "runs", **arguments}
    with pytest.raises(UserError, match=said) as caught:
        optimizer.main(optimizer.Args(**given))
    assert "\n" not in str(caught.value) and KEY not in str(caught.value)
    assert not list((tmp_path / "runs").glob("*"))


def test_the_rewriter_is_served() -> None:
    line = [sys.executable, str(ROOT / "scripts" / "serve_rewriter.py"), "--port", "0", "--fault", "429=0.1"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert child.stdout is not None
    assert any(re.match(r"OPENAI_BASE_URL=http://127\.0\.0\.1:\d+/v1", text) for text in child.stdout)
    assert child.poll() is None
    child.terminate()
    child.communicate(timeout=300)
    server = script("serve_rewriter")
    for fault, reason in (("fire", "KIND=SHARE"), ("fire=0.1", "unknown"), ("429=2", "between 0 and 1")):
        with pytest.raises(UserError, match=reason):
            server.main(server.Args(fault=(fault,)))
    nan = float("nan")
    for name, value in (
        ("port", 99999), ("port", -1), ("latency", -1.0), ("latency", nan), ("stall", nan), ("seed", -1),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"{name} .*give"):
            server.main(server.Args(**{name: value}))
