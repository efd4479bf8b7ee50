"""How often luck refuses right kernels: ``python -m tests.evaluation.refusals DRAWINGS FILE...``

The first draft of each task file is checked on DRAWINGS times the secret cases of one judge, each time with other contents.
One line per file: how many of these a judge refuses, on which distributions, and the first reason.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from ke_gym.candidate import Candidate
from ke_gym.codegen import Program
from ke_gym.errors import UserError
from ke_gym.evaluation.checking import Entry, Rejected, check_case, draw_cases
from ke_gym.evaluation.evaluation import Errors
from ke_gym.evaluation.evaluator import Evaluator
from ke_gym.languages.artifact import Artifact
from ke_gym.tasks import Task

PATIENCE = 60.0


class Drawn(Evaluator):
    """An evaluator that checks again and again, and says no more than how often it refused."""

    drawings = 1

    def _check(self, artifact: Artifact, entries: dict[str, Entry], open_entry: Any) -> Errors:
        refused, where, why = 0, Counter[str](), ""
        for drawing in range(self.drawings):
            failed = False
            for index, case in enumerate(draw_cases(random.Random(drawing))):
                try:
                    for name, entry in entries.items():
                        check_case(self.judge, entry, name, case, index % 2, PATIENCE, hidden=False)
                except Rejected as rejected:
                    failed = True
                    where[case[1]] += 1
                    why = why or rejected.log
            refused += failed
        raise Rejected("correctness", f"{refused} of {self.drawings} {dict(where) or ''} {why}")


def main(drawings: int, files: list[str]) -> None:
    Drawn.drawings = drawings
    for file in files:
        try:
            task = Task.from_file(Path(file))
            program = Program.from_task(task)
            with Drawn(task, threads=1) as judge:
                said = judge.evaluate(Candidate(program.emit(program.seeds()[0]))).log
        except UserError as error:
            said = f"{error}"
        print(f"{Path(file).stem:40s} {said.strip()}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
