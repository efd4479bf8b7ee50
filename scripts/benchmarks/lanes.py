"""Work spread over processes that share this machine: each has a GPU, and that GPU's part of the processor's cores.

Several lanes may have the same GPU: while one of them races, the others open, compile and generate.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

from ke_gym.errors import UserError
from ke_gym.evaluation._libc import PR_SET_PDEATHSIG, prctl
from ke_gym.evaluation.gpu_client import NO_DEVICE

Job = TypeVar("Job")
END_SECONDS = 10.0
VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Share:
    """What one process has of the machine: a GPU, as ``CUDA_VISIBLE_DEVICES`` names it, and processor cores, as many of
    them at once as it has ``threads``; 0: eight at the most."""

    gpu: str
    cores: tuple[int, ...]
    threads: int = 0


class Lost(Exception):
    """A process ended before its answer."""


class Late(Exception):
    """There was no answer in time; the process was ended."""


def gpus() -> list[str]:
    """This machine's GPUs as ``CUDA_VISIBLE_DEVICES`` names them. Raises ``UserError`` if there are none."""
    count = torch.cuda.device_count()
    if not count:
        raise UserError(NO_DEVICE.format(why="torch sees none"))
    return (os.environ.get(VISIBLE) or ",".join(map(str, range(count)))).split(",")[:count]


def shares(devices: Sequence[str], lanes: int = 1) -> list[Share]:
    """``lanes`` times a share of every GPU; the cores are divided among the GPUs, not among the lanes of one."""
    cores, n = sorted(os.sched_getaffinity(0)), len(devices)
    parts = [tuple(cores[i * len(cores) // n : (i + 1) * len(cores) // n]) for i in range(n)]
    # With fewer cores than GPUs, some are shared.
    parts = [part or (cores[i % len(cores)],) for i, part in enumerate(parts)]
    each = [Share(gpu, part, max(1, len(part) // lanes)) for gpu, part in zip(devices, parts)]
    return each * lanes


class Lane:
    """A process with one share, which runs one job after another. A context manager."""

    def __init__(self, share: Share) -> None:
        self.share = share
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None

    def run(self, function: Callable[[Job], Any], job: Job, until: float = math.inf) -> Any:
        """``function(job)``, in the process; an exception of it is raised here.

        Both are pickled. Raises ``Lost``, or ``Late`` at ``until`` by the monotonic clock; the next job then has
        another process.
        """
        if self._pipe is None:
            self._start()
        assert self._pipe is not None
        try:
            self._pipe.send((function, job))
            while not self._pipe.poll(min(1.0, max(0.0, until - time.monotonic()))):
                if time.monotonic() >= until:
                    raise Late
            answer, error = self._pipe.recv()
        except (EOFError, OSError) as gone:
            self.close()
            raise Lost(f"the process for GPU {self.share.gpu} died") from gone
        except BaseException:
            self.close()
            raise
        if error is not None:
            raise error
        return answer

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        # Not as a daemon: those may not have processes of their own.
        self._process = context.Process(target=_serve, args=(theirs, self.share))
        self._process.start()
        theirs.close()

    def close(self, kill: bool = True) -> None:
        """End the process, whatever it does, or let it end by itself if it does nothing; what it started goes with
        it."""
        pipe, process, self._pipe, self._process = self._pipe, self._process, None, None
        if pipe is not None and process is not None:
            pipe.close()
            if not kill:
                process.join(END_SECONDS)
            process.kill()
            process.join()

    def __enter__(self) -> Lane:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _serve(pipe: Connection, share: Share) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends everybody
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ[VISIBLE] = share.gpu
    os.sched_setaffinity(0, share.cores)
    torch.set_num_threads(min(8, share.threads or len(share.cores)))
    while True:
        try:
            function, job = pipe.recv()
        except EOFError:
            return
        try:
            answer: tuple[Any, Exception | None] = (function(job), None)
        except Exception as error:  # the parent's to handle
            answer = (None, error)
        try:
            pipe.send(answer)
        except Exception:  # what does not pickle is told in words
            pipe.send((None, Lost(f"{type(answer[1]).__name__}: {answer[1]}")))


def spread(
    function: Callable[[Job], Any], jobs: Iterator[Job], shares: Sequence[Share], until: float = math.inf
) -> Iterator[tuple[Job, Any, Exception | None]]:
    """``function(job)`` for every job, each in the next free lane; (job, answer, error) as they end.

    A job is taken from ``jobs`` when a lane is free for it; at ``until``, by the monotonic clock, what still runs is
    ended with the error ``Late``.
    """
    finished: queue.Queue[tuple[Job, Any, Exception | None] | None] = queue.Queue()
    turn, over = threading.Lock(), threading.Event()
    lanes = [Lane(share) for share in shares]

    def work(lane: Lane) -> None:
        try:
            while time.monotonic() < until and not over.is_set():
                with turn:
                    job = next(jobs, None)
                if job is None:
                    return
                try:
                    finished.put((job, lane.run(function, job, until), None))
                except Exception as error:
                    finished.put((job, None, error))
        finally:
            lane.close(kill=False)
            finished.put(None)

    for lane in lanes:
        threading.Thread(target=work, args=(lane,), daemon=True).start()
    try:
        ended = 0
        while ended < len(lanes):
            one = finished.get()
            if one is None:
                ended += 1
            else:
                yield one
    finally:
        over.set()
        for lane in lanes:  # after Ctrl-C, or a caller that left early
            lane.close()
