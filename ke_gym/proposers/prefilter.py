"""What can be said of a candidate without building it: whether it is Python, and keeps the module contract.

A build in the sandbox costs half a second and finds all of this too. Here it costs a millisecond, so that a
model can be asked to mend it at once. Nothing here is a safeguard: that is the sandbox.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence

from ke_gym import syntax
from ke_gym.proposers.answers import Flaw

MODULES = {
    "__future__",
    "collections",
    "dataclasses",
    "functools",
    "itertools",
    "ke_gym",
    "math",
    "torch",
    "typing",
}
"""What any kernel module may import; ``LANGUAGE_MODULES`` are added for some languages."""
LANGUAGE_MODULES = {
    "triton": {"triton"},
    "cute": {"cutlass", "cuda"},
    "flydsl": {"flydsl"},
}
_CALLS = {"exec", "eval", "compile", "open", "__import__", "input", "breakpoint", "globals", "vars"}
_WRITTEN_IN = {
    "cpp": (re.compile(r"\blang\.cpp\(|^from ke_gym\.lang import .*\bcpp\b", re.M), "lang.cpp(...)"),
    "triton": (re.compile(r"@(triton\.)?(autotune|heuristics|jit)\b|\blang\.cuda\("), "@triton.jit"),
    "cuda": (re.compile(r"\blang\.cuda\("), "lang.cuda(...)"),
    "hip": (re.compile(r"\blang\.hip\("), "lang.hip(...)"),
}


def check(source: str, language: str, inputs: int, state: Sequence[str]) -> Flaw | None:
    """What is wrong with the module, or None. ``inputs`` counts the task's inputs, ``state`` names the entries
    that ``forward`` may take by name."""
    try:
        tree = syntax.parse(source)
    except (RecursionError, MemoryError):
        return Flaw("syntax", "the module is nested too deeply for Python's parser")
    except (SyntaxError, ValueError) as error:
        where = (
            f" (line {error.lineno}: {(error.text or '').strip()[:80]!r})"
            if isinstance(error, SyntaxError)
            else ""
        )
        return Flaw("syntax", f"the module is no Python: {error.args[0] if error.args else error}{where}")
    return (
        _imports(tree, language) or _calls(tree) or _entry(tree, inputs, state) or _language(source, language)
    )


def _imports(tree: ast.Module, language: str) -> Flaw | None:
    allowed = MODULES | LANGUAGE_MODULES.get(language, set())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = ["." if node.level else node.module or ""]
        else:
            continue
        for name in names:
            if name.partition(".")[0] not in allowed:
                known = ", ".join(sorted(allowed - {"__future__"}))
                reason = f"a kernel module may not import {name!r}; it may import {known}"
                return Flaw("contract", f"line {node.lineno}: {reason}")
            if name.startswith("ke_gym") and name not in ("ke_gym", "ke_gym.lang"):
                reason = f"of ke_gym a kernel module may import lang only, not {name}"
                return Flaw("contract", f"line {node.lineno}: {reason}")
    return None


def _calls(tree: ast.Module) -> Flaw | None:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _CALLS:
            return Flaw("contract", f"line {node.lineno}: a kernel module may not call {node.func.id}")
    return None


def _entry(tree: ast.Module, inputs: int, state: Sequence[str]) -> Flaw | None:
    """The module defines what is called, with parameters that exist."""
    forward = next((n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "forward"), None)
    if forward is None:
        named = {
            t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)
        }
        if "forward" in named or any(isinstance(n, ast.ClassDef) and n.name == "ModelNew" for n in tree.body):
            return None
        return Flaw("contract", "the module defines neither forward(...) nor class ModelNew at its top level")
    given = forward.args
    positional = [*given.posonlyargs, *given.args]
    if len(positional) < inputs and given.vararg is None:
        return Flaw(
            "contract", f"forward takes {len(positional)} positional arguments, the task has {inputs} inputs"
        )
    prepare = next((n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "prepare"), None)
    if prepare is not None:  # what it returns is known once it is run
        wrong = [a.arg for a in (*prepare.args.args, *prepare.args.kwonlyargs) if a.arg not in state]
        what = (
            f"prepare takes {wrong[0]!r}, which is no parameter or buffer of the reference" if wrong else ""
        )
        return Flaw("contract", what) if wrong else None
    without_default = positional[inputs : len(positional) - len(given.defaults)]
    without_default += [a for a, default in zip(given.kwonlyargs, given.kw_defaults) if default is None]
    for argument in without_default:
        if argument.arg not in state:
            known = ", ".join(state) or "none"
            return Flaw(
                "contract",
                f"forward takes {argument.arg!r}, which is neither one of the {inputs} inputs nor a parameter or"
                f" buffer of the reference ({known})",
            )
    return None


def _language(source: str, language: str) -> Flaw | None:
    """A module in another language than was asked for is a misunderstanding, not a kernel."""
    wanted = _WRITTEN_IN.get(language)
    if wanted is None or wanted[0].search(source):
        return None
    other = next((name for name, (pattern, _) in _WRITTEN_IN.items() if pattern.search(source)), None)
    if other is not None:
        return Flaw(
            "contract", f"the kernels are written in {other}, but {language} was asked for ({wanted[1]})"
        )
    return None
