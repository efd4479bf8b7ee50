"""The built-in rewriter behind an OpenAI-compatible endpoint: the whole LLM path without a model or a key.

python scripts/serve_rewriter.py --port 8400 &
OPENAI_BASE_URL=http://127.0.0.1:8400/v1 python scripts/optimize.py softmax --proposer openai --model rewriter

python scripts/serve_rewriter.py --latency 5 --fault 429=0.1 --fault half=0.05     # as real ones are
"""

from __future__ import annotations

import math
import sys
import threading
from dataclasses import dataclass
from typing import Annotated

import tyro

from ke_gym import tasks
from ke_gym.errors import UserError
from ke_gym.job import check_seed
from ke_gym.testing.rewriter_endpoint import RewriterEndpoint


@dataclass(frozen=True)
class Args:
    """Serve the rewriter as the model "rewriter" until Ctrl-C."""

    port: int = 8400
    """The port on 127.0.0.1; 0 for a free one."""
    latency: float = 0.0
    """Seconds each answer takes."""
    fault: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """KIND=SHARE of the calls that go wrong: 429, 500, stall, half, malformed, truncated, prose, empty, declined,
    misquoted, contract. May be given several times."""
    stall: float = 600.0
    """Seconds that a stalled call takes."""
    key: str = ""
    """The key that clients have to send; any, if none is given."""
    task: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Task files of which prompts may speak, besides the built-in tasks."""
    seed: int = 0
    """Seed of the faults and of random drafts."""


def main(args: Args) -> int:
    if not 0 <= args.port <= 65535:
        raise UserError(f"--port {args.port} is no port; give one from 0 (any free one) to 65535")
    for name, seconds in (("latency", args.latency), ("stall", args.stall)):
        if not 0 <= seconds < math.inf:
            raise UserError(f"--{name} {seconds} is no time; give seconds, at least 0")
    check_seed(args.seed)
    faults = dict(_share(text) for text in args.fault)
    known = {task.name: task for spec in args.task for task in tasks.resolve(spec)}
    try:
        endpoint = RewriterEndpoint(
            args.port,
            faults=faults,
            latency=args.latency,
            stall=args.stall,
            key=args.key,
            seed=args.seed,
            tasks=known,
        )
    except OSError as error:
        raise UserError(
            f"port {args.port} cannot be served ({error.strerror}); choose another --port"
        ) from error
    with endpoint:
        print(f"OPENAI_BASE_URL={endpoint.url}  (model: rewriter)", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print(f"{endpoint.calls} calls, faults: {endpoint.injected or 'none'}")
    return 0


def _share(text: str) -> tuple[str, float]:
    kind, _, share = text.partition("=")
    try:
        return kind, float(share)
    except ValueError:
        raise UserError(f"--fault {text!r} is not of the form KIND=SHARE, for example 429=0.1") from None


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Args)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
