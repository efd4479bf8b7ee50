"""Policy files: JSON with compressed arrays, and what the policy was trained on.

Nothing in a policy file is executed: no pickle, no code, so that a file from a stranger can be read. A file
says which actions and observation it was made for; one made for others is refused.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ke_gym.errors import UserError
from ke_gym.files import write_whole
from ke_gym.policies.features import SPACES_VERSION
from ke_gym.strategies import ACTIONS

FORMAT = 2
_DTYPES = ("float32", "float64", "int64", "bool")


@dataclass(frozen=True)
class PolicyFile:
    """A policy file as read: ``state`` holds JSON values and arrays."""

    path: str
    format: Any
    policy: str
    actions: Any
    spaces: Any
    trained_on: dict[str, Any]
    state: dict[str, Any]


def write(path: str | Path, policy: str, trained_on: dict[str, Any], state: dict[str, Any]) -> None:
    """Write a policy file, whole or not at all; ``UserError`` if it cannot be written."""
    data = {
        "format": FORMAT,
        "policy": policy,
        "actions": [action.name for action in ACTIONS],
        "spaces": SPACES_VERSION,
        "trained_on": trained_on,
        "state": encode(state),
    }
    path = Path(path)
    try:
        write_whole(path, json.dumps(data, indent=1).encode())
    except OSError as error:
        raise UserError(f"the policy file {path} cannot be written: {error.strerror}") from error


def read(path: str | Path) -> PolicyFile:
    """The file at ``path``; ``UserError`` if it cannot be read or holds no policy."""
    try:
        data = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"the policy file {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"the policy file {path} is not JSON: {error}") from error
    if not isinstance(data, dict) or "policy" not in data:
        raise UserError(f"{path} is not a saved policy: it names none")
    header = PolicyFile(
        str(path), data.get("format"), str(data["policy"]), data.get("actions"), data.get("spaces"), {}, {}
    )
    check(header)
    with damage(header):
        state, trained_on = decode(data["state"]), data["trained_on"]
        if not isinstance(state, dict) or not isinstance(trained_on, dict):
            raise ValueError("state and trained_on are not objects")
    return PolicyFile(
        header.path, header.format, header.policy, header.actions, header.spaces, trained_on, state
    )


def check(file: PolicyFile) -> None:
    """``UserError`` naming what differs, unless the file was made for this program's actions and spaces."""
    mine = [action.name for action in ACTIONS]
    differs = []
    if file.format != FORMAT:
        differs.append(f"format {file.format} instead of {FORMAT}")
    if file.actions != mine:
        theirs = file.actions if isinstance(file.actions, list) else []
        odd = sorted({*map(str, theirs)} ^ {*mine})
        differs.append(f"other actions ({', '.join(odd[:5]) or 'in another order'})")
    if file.spaces != SPACES_VERSION:
        differs.append(f"observation version {file.spaces} instead of {SPACES_VERSION}")
    if differs:
        raise UserError(f"the policy file {file.path} has {' and '.join(differs)}: train it again")


def check_tables(path: str, trained_on: Mapping[str, Any], tables: Mapping[str, str]) -> None:
    """``UserError`` naming the tables whose hash is not the one the policy was trained on.

    ``tables`` maps names to hashes; tables the policy has never seen are nobody's mismatch.
    """
    known = trained_on.get("tables", {})
    changed = sorted(name for name in known.keys() & tables.keys() if known[name] != tables[name])
    missing = sorted(known.keys() - tables.keys())
    if changed or missing:
        parts = [f"{', '.join(changed)} changed since"] if changed else []
        parts += [f"{', '.join(missing)} not among the tables now"] if missing else []
        raise UserError(f"{path} was trained on other tables: {'; '.join(parts)}; start a new training")


def check_kinds(state: Mapping[str, Any], model: Mapping[str, Any], where: str = "") -> None:
    """``ValueError`` unless what ``state`` and ``model`` both hold is alike: of the same type, and arrays of the same
    shape but for axes of length 0; nothing is NaN."""
    for key in model.keys() & state.keys():
        name, value, like = f"{where}{key}", state[key], model[key]
        if isinstance(like, np.ndarray):
            if not isinstance(value, np.ndarray) or value.dtype.kind != like.dtype.kind:
                raise ValueError(f"{name} is no array of {like.dtype}")
            if value.ndim != like.ndim or any(m not in (0, n) for n, m in zip(value.shape, like.shape)):
                raise ValueError(f"{name} has the shape {value.shape} instead of {like.shape}")
            if np.isnan(value).any():
                raise ValueError(f"{name} holds what is no number")
        elif isinstance(like, Mapping):
            if not isinstance(value, Mapping):
                raise ValueError(f"{name} is no object")
            check_kinds(value, like, f"{name}.")
        elif isinstance(like, int | float | np.number):
            if not isinstance(value, int | float) or value != value:
                raise ValueError(f"{name} is no number")
        elif isinstance(like, str | list | tuple):
            kind = str if isinstance(like, str) else list
            if not isinstance(value, kind):
                raise ValueError(f"{name} is no {kind.__name__}")


@contextmanager
def damage(file: PolicyFile) -> Iterator[None]:
    """Turns what a malformed state raises into a ``UserError``."""
    try:
        yield
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, zlib.error) as error:
        raise UserError(f"the policy file {file.path} is damaged ({error!r}); train it again") from error


def encode(value: Any) -> Any:
    """JSON for nested dicts and lists of plain values and arrays."""
    if isinstance(value, np.ndarray):
        if value.dtype.name not in _DTYPES:
            raise TypeError(f"policy files hold arrays of {', '.join(_DTYPES)}, not {value.dtype}")
        data = base64.b64encode(zlib.compress(np.ascontiguousarray(value).tobytes(), 9)).decode()
        return {"array": value.dtype.name, "shape": list(value.shape), "data": data}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    return value


def decode(value: Any) -> Any:
    """The inverse of ``encode`` (tuples come back as lists)."""
    if isinstance(value, dict) and value.keys() == {"array", "shape", "data"}:
        if value["array"] not in _DTYPES:
            raise ValueError(f"unknown array type {value['array']!r}")
        dtype, shape = np.dtype(value["array"]), tuple(int(n) for n in value["shape"])
        size = int(np.prod(shape)) * dtype.itemsize
        # Never inflate more than the shape admits: a few bytes could claim gigabytes.
        raw = zlib.decompressobj().decompress(base64.b64decode(value["data"]), size + 1)
        if len(raw) != size:
            raise ValueError("an array's data does not fit its shape")
        return np.frombuffer(raw, dtype).reshape(shape).copy()
    if isinstance(value, dict):
        return {key: decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [decode(item) for item in value]
    return value
