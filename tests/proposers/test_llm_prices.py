from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from ke_gym.errors import UserError
from ke_gym.proposers import prices
from ke_gym.proposers.prices import FREE, Price, Purse
from ke_gym.proposers.tiers import Tiers

HOSTED = "https://api.example.com/v1"


def test_prices_are_found_by_name_prefix_and_version() -> None:
    table = {"gpt-9": Price(1, 2), "gpt-9-mini": Price(3, 4)}
    for name in (
        "gpt-9-mini",
        "openai/gpt-9-mini",
        "gpt-9-mini-2027-01-31",
        "gpt-9-mini-latest",
        "gpt-9-mini:free",
    ):
        assert prices.find(table, name, HOSTED) == Price(3, 4)
    assert prices.find(table, "gpt-9-maxi", HOSTED) is None
    for url in (
        "http://localhost:8000/v1",
        "http://127.0.0.1/v1",
        "http://10.1.2.3:80/v1",
        "http://box.local/v1",
    ):
        assert prices.find(table, "anything", url) == FREE
    assert not prices.local("http://8.8.8.8/v1") and not prices.local("nonsense")


def test_a_users_table_overrules_the_built_in_one(tmp_path: Path) -> None:
    path = tmp_path / "prices.json"
    path.write_text(json.dumps({"gpt-4o": [1, 2], "mine": [0, 0.5]}))
    table = prices.load(path)
    assert table["gpt-4o"].of(1e6, 1e6) == pytest.approx(3.0)
    assert table["mine"].of(1e6, 1e6) == pytest.approx(0.5)
    assert len(table) == len(prices.load()) + 1


@pytest.mark.parametrize(
    "text", ["[1]", "{", '{"m": 3}', '{"m": [1, -2]}', '{"m": [1, "2"]}', '{"m": [1, NaN]}']
)
def test_a_bad_table_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "prices.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"prices\.json"):
        prices.load(path)
    with pytest.raises(UserError, match="missing"):
        prices.load(tmp_path / "missing.json")


def test_a_purse_is_never_overdrawn_whoever_reaches_into_it() -> None:
    purse = Purse()
    purse.fund(1.0, 0.2)
    taken: list[bool] = []

    def spend() -> None:
        for _ in range(50):
            if purse.reserve(0.01):
                taken.append(True)
                purse.settle(0.01, 0.007)

    threads = [threading.Thread(target=spend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert purse.spent <= 1.0
    assert purse.spent == pytest.approx(0.2 + 0.007 * len(taken))
    assert not purse.reserve(0.01)
    unlimited = Purse()
    assert unlimited.reserve(1e9)


def test_the_dear_model_is_asked_only_while_it_gains_more() -> None:
    def shares(gains: dict[str, float], dollars: dict[str, float]) -> dict[str, int]:
        tiers = Tiers(("small", "large"))
        counts = {"small": 0, "large": 0}
        for _ in range(200):
            model = tiers.choose()
            counts[model] += 1
            tiers.release(model)
            tiers.learn(model, gains[model], dollars[model])
        return counts

    dear = {"small": 0.001, "large": 0.02}
    alike = shares({"small": 0.05, "large": 0.05}, dear)
    assert alike["small"] > 2 * alike["large"] > 0
    better = shares({"small": 0.02, "large": 0.3}, dear)
    assert better["large"] > 2 * better["small"] > 0


def test_models_in_flight_are_not_all_the_same() -> None:
    tiers = Tiers(("a", "b", "c"))
    assert {tiers.choose() for _ in range(3)} == {"a", "b", "c"}
    assert Tiers(("only",)).choose() == "only"
