"""Random small networks in every language: what layers alone do not show is in what they become together.

More of them: ``python -m tests.codegen.networks LANGUAGE FIRST COUNT``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.codegen.networks import network


def test_networks_differ_and_repeat() -> None:
    texts = [network(seed) for seed in range(50)]
    assert texts == [network(seed) for seed in range(50)] and len(set(texts)) == 50


@pytest.mark.parametrize("language", ["cpp", "cuda", "triton"])
def test_what_is_generated_computes_what_the_network_does(language: str) -> None:
    if language == "triton":
        pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "tests.codegen.networks", language, "0", "5"],
        capture_output=True, text=True, timeout=900, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 5 and not any(found.values()), {key: text for key, text in found.items() if text}
