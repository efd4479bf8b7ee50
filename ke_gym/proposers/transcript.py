"""Transcripts: every prompt and answer of a search as one Markdown file each, for people to read."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ke_gym.proposers.base import Usage
from ke_gym.proposers.prompt import Prompt


def write(
    folder: Path,
    step: str,
    facts: dict[str, Any],
    prompt: Prompt,
    messages: Sequence[dict[str, str]],
    usage: Usage,
    dollars: float,
) -> Path:
    """Write the conversation of one proposal to ``folder``; returns the file.

    ``facts`` are shown first, then where each part of the prompt came from, then the messages as they were sent
    and answered.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shown = {
        **facts,
        "model": usage.model,
        "calls": usage.calls,
        "tokens": f"{usage.prompt_tokens} in, {usage.completion_tokens} out",
        "seconds": f"{usage.seconds:.2f}",
        "dollars": f"{dollars:.6f}",
        "documents": ", ".join(prompt.documents) or "none",
    }
    lines = ["---", *(f"{key}: {' '.join(str(value).split())}" for key, value in shown.items()), "---", ""]
    lines += ["| part | template | from | tokens (about) | lines left out |", "|---|---|---|---|---|"]
    for part in prompt.parts:
        made = f"{part.template} v{part.version}"
        lines.append(f"| {part.name} | {made} | {part.origin} | {part.tokens} | {part.cut or ''} |")
    for message in messages:
        lines += ["", f"## {message['role']}", "", message["content"]]
    path = folder / f"{step}.md"
    for again in itertools.count(2):  # a resumed run asks anew what was in flight
        if not path.exists():
            break
        path = folder / f"{step}-again{again}.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="replace")
    return path
