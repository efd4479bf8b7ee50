"""Settings of a language model as a proposer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ke_gym.errors import UserError
from ke_gym.proposers.base import EditMode
from ke_gym.redaction import without_login

Memory = Literal["auto", "ancestors", "siblings", "contrast", "none"]
"""What a prompt tells of the search so far: the way to the parent, what else was made from it, the best kernel
beside a slower one, or nothing (a clean slate). ``auto``: ancestors and siblings; for a draft the leaders."""


@dataclass(frozen=True)
class LLM:
    """How models are asked. The key is no setting: it comes from ``OPENAI_API_KEY`` and goes nowhere else.

    ``models`` lists the tiers to choose from (one is enough); ``base_url`` overrules ``OPENAI_BASE_URL``.
    ``max_tokens`` bounds one answer, ``timeout`` (seconds) one call; ``retries`` follow rate limits, server
    errors and broken connections. ``in_flight`` proposals are written at once. ``prices`` is a JSON file of
    dollars per million tokens, ``{"model": [in, out]}``. ``knowledge`` are folders that overlay the built-in
    documents, ``use_knowledge`` False leaves all out; ``learned`` is the folder of what earlier searches taught.
    ``record`` and ``replay`` name a cassette's file.
    """

    models: tuple[str, ...] = ()
    base_url: str = ""
    edit_mode: EditMode | Literal["auto"] = "auto"
    memory: Memory = "auto"
    max_tokens: int = 16_000
    temperature: float | None = None
    timeout: float = 300.0
    retries: int = 4
    in_flight: int = 8
    prices: str = ""
    knowledge: tuple[str, ...] = ()
    use_knowledge: bool = True
    learned: str = ""
    record: str = ""
    replay: str = ""

    def __post_init__(self) -> None:
        if self.memory not in get_args(Memory):
            raise UserError(f"memory {self.memory!r} is unknown; choose {', '.join(get_args(Memory))}")
        if self.edit_mode not in ("auto", *get_args(EditMode)):
            raise UserError(f"edit mode {self.edit_mode!r} is unknown; choose auto, edit or rewrite")
        for name, least in (("max_tokens", 256), ("timeout", 0.001), ("retries", 0), ("in_flight", 1)):
            if not getattr(self, name) >= least:  # NaN is not, either
                raise UserError(f"{name} = {getattr(self, name)} is too little; give at least {least}")
        if self.record and self.replay:
            raise UserError("a cassette is either recorded or replayed, not both")

    def to_dict(self) -> dict[str, Any]:
        """The settings, without the login in an address: it comes from ``OPENAI_BASE_URL`` again."""
        return {**asdict(self), "base_url": without_login(self.base_url)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LLM:
        given: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items()}
        return cls(**given)


def models(text: str) -> tuple[str, ...]:
    """The names in a comma-separated list."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def writable(path: str) -> Path:
    """The file a recording goes to; ``UserError`` if it exists already or its folder does not."""
    file = Path(path)
    if file.exists():
        raise UserError(f"{file} exists already; a recording does not overwrite another")
    if not file.parent.is_dir():
        raise UserError(f"{file.parent} is no folder; a recording needs one to be written to")
    return file
