"""Kernel module → artifact in a compile sandbox, and the cache of what was built."""

from __future__ import annotations

import functools
import hashlib
import os
import signal
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ke_gym.errors import UserError
from ke_gym.evaluation.channel import Channel, ProtocolError
from ke_gym.evaluation.sandbox import GIB, Sandbox, compiler_paths
from ke_gym.evaluation.zygote import Zygote
from ke_gym.files import write_whole
from ke_gym.languages import cpp
from ke_gym.languages.artifact import Artifact
from ke_gym.languages.base import BuildError, BuildOptions, Signature, build, get_language

ARTIFACT_LIMIT = 256 << 20
BUILD_SECONDS = 120.0
LOG_LIMIT = 20_000
NICE = 10
"""On a machine with GPUs builds go on beside races, whose processes come first."""
END_SECONDS = 5.0
"""How long a build that has closed its connection may take to end."""
# Part of every key. Raise it when tracing or compiling would give another artifact for the same source.
BUILD_VERSION = 2
_OUTCOMES = ("compile", "constraints", "correctness")


class Builder:
    """Builds artifacts, several at once if asked by several threads; only this process writes the cache."""

    def __init__(self, zygote: Zygote, cache_dir: Path) -> None:
        self._zygote = zygote
        self._folder = cache_dir
        self._folder.mkdir(parents=True, exist_ok=True)

    def build(
        self,
        source: str,
        signature: bytes,
        language: str = "cpp",
        target: str = "cpu",
        timeout: float = BUILD_SECONDS,
        arch: str = "",
        multiprocessors: int = 0,
    ) -> Artifact:
        """The artifact of ``source`` for the task that ``signature`` describes; see ``BuildOptions`` for GPUs.

        Raises ``BuildError``: its outcome is what the language says, ``"timeout"`` when it takes longer than
        ``timeout`` seconds, ``"compile"`` when the process dies (out of memory, killed by a limit).
        Raises ``UserError`` for a language that is unknown or not installed.
        """
        get_language(language)
        if language == "triton" and find_spec("triton") is None:
            raise UserError("Triton is not installed: pip install 'ke-gym[triton]'")
        options = {"target": target, "arch": arch, "multiprocessors": multiprocessors}
        path = self._folder / f"{self._key(source, signature, language, options)}.artifact"
        known = _load(path)
        if known is not None:
            return known
        data = self._build(source, signature, language, options, timeout)
        try:
            artifact = Artifact.from_bytes(data)
        except ValueError as error:
            raise BuildError("compile", f"the build gave no valid artifact: {error}") from error
        _store(path, data)
        return artifact

    def _build(
        self, source: str, signature: bytes, language: str, options: dict[str, Any], timeout: float
    ) -> bytes:
        sandbox = Sandbox(
            "compile", memory_bytes=4 * GIB, cpu_seconds=int(timeout) + 1, read_only=compiler_paths()
        )
        text = source.encode()
        args = {"source_bytes": len(text), "language": language, "options": {**options, "seconds": timeout}}
        module = "builder_triton" if language == "triton" else "builder"
        with self._zygote.spawn(f"ke_gym.evaluation.{module}:serve", args, sandbox=sandbox) as worker:
            try:
                worker.channel.send({}, text + signature)
                header, data = worker.channel.recv(timeout, limit=ARTIFACT_LIMIT)
            except TimeoutError:
                raise BuildError("timeout", f"building took longer than {timeout:g} s") from None
            except ProtocolError as error:
                raise BuildError("compile", f"the build answered nonsense: {error}") from None
            except EOFError:
                try:
                    how = worker.wait(END_SECONDS)
                except TimeoutError:
                    raise BuildError("compile", "the build closed its connection and went on") from None
                if how.signal == signal.SIGXCPU:  # seen before the time was up by the clock
                    raise BuildError("timeout", f"building took longer than {timeout:g} s") from None
                log = worker.log(2000).strip()
                text_ = f"the build died with {how}" + (f"\n{log}" if log else "")
                raise BuildError("compile", text_) from None
        if "outcome" in header:
            outcome = header["outcome"] if header["outcome"] in _OUTCOMES else "compile"
            raise BuildError(outcome, str(header.get("log", ""))[:LOG_LIMIT])
        return data

    def _key(self, source: str, signature: bytes, language: str, options: dict[str, Any]) -> str:
        asked = (source, language, repr(sorted(options.items())), _toolchain())
        parts = [signature, *(text.encode() for text in asked)]
        digest = hashlib.sha256()
        for part in (*parts, str(BUILD_VERSION).encode()):
            digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()


@functools.cache
def _toolchain() -> str:
    """What the same source may compile differently under: compilers, flags, our headers, processor, torch."""
    found = sorted((c.family, c.path, c.version) for c in cpp.compilers().values())
    return f"{found} {cpp.environment_id()} {_triton()} {torch.__version__}"


def _triton() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return ""


def _load(path: Path) -> Artifact | None:
    """The cached artifact; None if there is none, or if what is there is damaged (it is built again)."""
    try:
        digest, data = path.read_bytes().split(b"\n", 1)
        if hashlib.sha256(data).hexdigest().encode() != digest:
            return None
        return Artifact.from_bytes(data)
    except (OSError, ValueError):
        return None


def _store(path: Path, data: bytes) -> None:
    write_whole(path, hashlib.sha256(data).hexdigest().encode() + b"\n" + data)


def serve(channel: Channel, args: dict[str, Any], fds: list[int]) -> None:
    """Entry of a build, inside the compile sandbox."""
    os.nice(NICE)
    _, blob = channel.recv(30.0)
    source, signature = blob[: args["source_bytes"]].decode(), blob[args["source_bytes"] :]
    try:
        options = BuildOptions(**args["options"])
        artifact = build(source, Signature.from_bytes(signature), args["language"], options)
    except BuildError as error:
        channel.send({"outcome": error.outcome, "log": error.log})
    except UserError as error:  # the module's: what a user can mend was looked at before the build
        channel.send({"outcome": "constraints", "log": str(error)})
    except MemoryError:
        channel.send({"outcome": "compile", "log": "building ran out of memory"})
    else:
        channel.send({}, artifact.to_bytes())
