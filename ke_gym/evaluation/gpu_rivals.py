"""Compiling a reference with ``torch.compile`` while others race on the same device.

Most of it is work for processors. What Inductor does on the device is fenced in: it has it alone while it times
alternatives, so that it chooses as well as by itself, and shares it where it only computes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ke_gym.evaluation.gpu_lock import DeviceLock
from ke_gym.tasks.task import Reference

WARM_CALLS = 2


def compiled(
    reference: Reference, mode: str, arguments: Sequence[Any], lock: DeviceLock
) -> Callable[..., tuple[Tensor, ...]]:
    """The reference through ``torch.compile``, compiled for these arguments and called."""
    made = reference.compiled(mode)
    with fenced(lock):
        made(*arguments)
    with lock.shared():
        for _ in range(WARM_CALLS):
            made(*arguments)
        _end()
    return made


@contextmanager
def fenced(lock: DeviceLock) -> Iterator[None]:
    """Let Inductor have the device alone for everything, or, where it has the places that are known, only while it times."""
    places = _places()
    with ExitStack() as stack:
        if places is None:
            stack.enter_context(lock.alone())
        else:
            timing, computing = places
            for where, name in timing:
                stack.enter_context(_held(where, name, lock.alone))
            for where, name in computing:
                stack.enter_context(_held(where, name, lock.shared))
        yield


def _places() -> tuple[list[tuple[Any, str]], list[tuple[Any, str]]] | None:
    """Where Inductor times, and where it runs or fills memory otherwise; None in a version that has other places."""
    from torch._inductor import output_code, select_algorithm
    from torch._inductor.codegen import triton
    from torch._inductor.runtime import benchmarking

    try:
        timing = [(benchmarking.benchmarker, "benchmark_gpu")]
        computing = [
            (output_code.CompiledFxGraph, "__call__"),
            (select_algorithm.AlgorithmSelectorCache, "benchmark_example_value"),
            (triton.TritonScheduling, "benchmark_codegened_module"),
        ]
        for where, name in (*timing, *computing):
            getattr(where, name)
    except AttributeError:
        return None
    return timing, computing


def _held(
    where: Any, name: str, context: Callable[[], AbstractContextManager[None]]
) -> AbstractContextManager[Any]:
    """``where.name`` runs in the context, to the end of what it enqueues, until this one is left."""
    function = getattr(where, name)

    @functools.wraps(function)
    def within(*arguments: Any, **options: Any) -> Any:
        _end()  # an outer context is let go of meanwhile
        with context():
            result = function(*arguments, **options)
            _end()
            return result

    static = isinstance(where, type) and isinstance(vars(where).get(name), staticmethod)
    return mock.patch.object(where, name, staticmethod(within) if static else within)


def _end() -> None:
    """Wait for what this process has enqueued: it must not go on when others have the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
