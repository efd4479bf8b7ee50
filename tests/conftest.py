"""What all tests share: nothing of theirs goes into the user's own caches and records."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """``KE_GYM_HOME`` is a folder of this session (with pytest-xdist: of this worker)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KE_GYM_HOME", str(tmp_path_factory.mktemp("ke_gym_home")))
        yield
