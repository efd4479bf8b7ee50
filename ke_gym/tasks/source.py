"""Executing task files, and saying where they are broken."""

from __future__ import annotations

import contextlib
import difflib
import linecache
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

from ke_gym.errors import UserError


def execute(source: str, path: str, module_name: str, overrides: Mapping[str, Any]) -> ModuleType:
    """Run a task file's text in a new module whose tracebacks name `path`; then overwrite globals.

    The module is put into `sys.modules`: dataclasses and torch.compile look a class's module up there.
    """
    # The text as it was read stays visible to tracebacks and `inspect`, even where the file is not.
    linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
    module = ModuleType(module_name)
    module.__file__ = path
    with blame(path, "running the file"):
        code = compile(source, path, "exec", dont_inherit=True)
        sys.modules[module_name] = module
        exec(code, module.__dict__)
    vars(module).update(overrides)
    return module


@contextlib.contextmanager
def blame(path: str, doing: str) -> Iterator[None]:
    """Turn what task code raises into a `UserError` naming file, line and reason."""
    try:
        yield
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(
            f"{error.filename or path}:{error.lineno or 1}: {error.msg}; mend the syntax"
        ) from error
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split()) or "no message"
        raise UserError(
            f"{path}:{_line(error, path)}: {doing} failed with {type(error).__name__}: {reason}"
        ) from error


def _line(error: BaseException, path: str) -> int:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return (frames[-1].lineno or 1) if frames else 1


def line_of(source: str, name: str) -> int:
    """The line on which a global is first assigned, for messages about its value."""
    for number, line in enumerate(source.splitlines(), start=1):
        if line.startswith(name) and line[len(name) :].lstrip()[:1] in ("=", ":"):
            return number
    return 1


def nearest(name: str, known: Iterable[str]) -> str:
    """ ", did you mean …?" with up to three near names; the empty string when nothing is near."""
    matches = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""
