"""Weights & Biases: one run per training or comparison; nothing is imported where it is off."""

from __future__ import annotations

import netrc
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from ke_gym.errors import UserError

Mode = Literal["online", "offline", "disabled"]
PROJECT = "ke-gym"


class Tracker:
    """A W&B run, or nothing at all with ``mode="disabled"``.

    Runs of one ``group`` belong to one experiment. With ``run_id`` an earlier run is continued. ``UserError`` without
    wandb, or online without a key.
    """

    def __init__(
        self,
        mode: Mode,
        *,
        kind: str,
        name: str,
        group: str,
        config: Mapping[str, Any],
        folder: Path,
        run_id: str | None = None,
    ) -> None:
        self._run: Any = None
        if mode == "disabled":
            return
        try:
            import wandb
        except ImportError as error:
            raise UserError("--wandb needs wandb: pip install 'ke-gym[wandb]'") from error
        if mode == "online" and not _has_key():
            raise UserError(
                "--wandb online needs a key: run `wandb login`, set WANDB_API_KEY, or record with --wandb offline and"
                " `wandb sync` later"
            )
        folder.mkdir(parents=True, exist_ok=True)
        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            mode=mode,
            job_type=kind,
            name=name,
            group=group,
            id=run_id,
            resume="allow" if run_id else None,
            dir=str(folder),
            config={**config, "machine": machine()},
            settings=wandb.Settings(console="off", silent=True),
        )

    @property
    def run_id(self) -> str | None:
        return str(self._run.id) if self._run is not None else None

    def log(self, figures: Mapping[str, Any], step: int | None = None) -> None:
        """Add figures to the run's curves."""
        if self._run is not None:
            self._run.log(dict(figures), step=step)

    def summary(self, figures: Mapping[str, Any]) -> None:
        """Set figures of the whole run."""
        if self._run is not None:
            self._run.summary.update(dict(figures))

    def table(self, name: str, columns: Sequence[str], rows: Iterable[list[Any]]) -> None:
        """Add a table."""
        if self._run is not None:
            self._run.log({name: self._wandb.Table(columns=list(columns), data=list(rows))})

    def image(self, name: str, path: Path) -> None:
        """Add a picture."""
        if self._run is not None:
            self._run.log({name: self._wandb.Image(str(path))})

    def artifact(self, name: str, kind: str, path: Path) -> None:
        """Keep a file with the run."""
        if self._run is not None:
            made = self._wandb.Artifact(name, type=kind)
            made.add_file(str(path))
            self._run.log_artifact(made)

    def finish(self) -> None:
        """End the run; harmless when repeated."""
        if self._run is not None:
            self._run.finish()
            self._run = None


def machine() -> dict[str, Any]:
    """What a time was measured on."""
    from ke_gym.targets import cpu

    facts = cpu.facts()
    return {
        "processor": facts.model, "cores": facts.cores, "fingerprint": facts.fingerprint,
        "python": platform.python_version(), "system": platform.system(),
    }  # fmt: skip


def _has_key() -> bool:
    """Whether wandb will find a key: in the environment, or where `wandb login` puts it."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return host in netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
