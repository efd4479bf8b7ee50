"""Benchmarks of the project itself. Never tests: they print what this machine does.

    python scripts/benchmark.py evaluation      can verdicts be trusted, and how fast are they
    python scripts/benchmark.py suite           how fast does every built-in task become
    python scripts/benchmark.py operators       how fast do the operators of the KernelEvolve paper become
    python scripts/benchmark.py drafts          how fast are the generator's kernels without a search; nothing is confirmed
    python scripts/benchmark.py env             how many steps a second do the environments make
    python scripts/benchmark.py llm             what prompts, faults and waiting for models cost
    python scripts/benchmark.py policies        do trained policies beat chance on families they never saw

Leave the machine alone while one runs. Tables in docs/results.md name the command that made them, but for those made
by a script of the day, which is not kept.
"""

from __future__ import annotations

import sys

import tyro
from benchmarks.drafts import Drafts
from benchmarks.env import Env
from benchmarks.evaluation import Evaluation
from benchmarks.llm import Llm
from benchmarks.operators import Operators
from benchmarks.policies import Policies
from benchmarks.suite import Suite

from ke_gym.errors import UserError

if __name__ == "__main__":
    try:
        tyro.extras.subcommand_cli_from_dict(
            {
                "evaluation": Evaluation,
                "suite": Suite,
                "operators": Operators,
                "drafts": Drafts,
                "env": Env,
                "llm": Llm,
                "policies": Policies,
            },
            description=__doc__,
        ).run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
