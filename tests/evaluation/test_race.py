from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from ke_gym.evaluation.race import Race, Rules, confirm, planned, race
from ke_gym.evaluation.record import MachineRecord
from ke_gym.targets.cpu import Peaks


def contestant(rng: random.Random, seconds: float, noise: float = 0.02) -> Callable[[], float]:
    return lambda: seconds * math.exp(rng.gauss(0, noise))


def run(ratio: float, seed: int, noise: float = 0.02, rules: Rules | None = None) -> Race:
    """A race in which the rival takes ``ratio`` times the candidate's time."""
    rng = random.Random(seed)
    return race(
        {"candidate": contestant(rng, 1e-3, noise), "incumbent": contestant(rng, ratio * 1e-3, noise)},
        "incumbent",
        draw=lambda: None,
        inspect=set,
        rng=rng,
        rules=rules or Rules(),
        margin=0.01,
    )


def test_who_never_clears_the_margin_leaves_early_where_rules_say_so_and_who_leads_does_not() -> None:
    early = Rules(unpromising=6)
    slower = [run(0.97, seed, 0.01, early) for seed in range(100)]
    assert sum((race.ended, race.rounds) == ("no gain", 6) for race in slower) > 90
    faster = [run(1.03, seed, 0.01, early) for seed in range(100)]
    assert all(race.ended == "faster" for race in faster)


def test_a_hopeless_candidate_leaves_after_one_round_and_a_slow_one_after_three() -> None:
    assert (run(0.25, 0).ended, run(0.25, 0).rounds) == ("hopeless", 1)
    assert (run(0.6, 0).ended, run(0.6, 0).rounds) == ("slow", 3)


def decision(ratio: float, seed: int, noise: float) -> bool:
    """A race and, if it is won, its confirmation, in processes that differ by a third of the rounds' noise."""
    rng = random.Random(-seed)
    first = run(ratio, seed, noise)
    if first.ended != "faster":
        return False
    rounds = planned(first, "incumbent", 0.01)

    def fresh(index: int) -> Race:
        own = ratio * math.exp(rng.gauss(0, noise / 3))
        candidate, incumbent = contestant(rng, 1e-3, noise), contestant(rng, own * 1e-3, noise)
        seconds = {
            "candidate": [candidate() for _ in range(rounds)],
            "incumbent": [incumbent() for _ in range(rounds)],
        }
        return Race(seconds)

    return confirm(fresh, "incumbent", margin=0.01)[2]


@pytest.mark.parametrize(("noise", "least"), [(0.02, 98), (0.05, 85)])
def test_five_percent_is_confirmed_and_twice_as_fast_soon(noise: float, least: int) -> None:
    assert sum(decision(1.05, seed, noise) for seed in range(100)) >= least
    assert planned(run(2.0, 0, noise), "incumbent", 0.01) == 7
    assert planned(run(1.05, 0, 0.05), "incumbent", 0.01) > 7


@pytest.mark.parametrize("noise", [0.02, 0.05])
def test_equals_are_almost_never_called_a_gain(noise: float) -> None:
    assert sum(decision(1.0, seed, noise) for seed in range(300)) <= 1


def test_five_percent_is_resolved_either_way() -> None:
    assert sum(run(1.05, seed).ended == "faster" for seed in range(100)) >= 95
    assert sum(run(0.95, seed).ended == "faster" for seed in range(100)) == 0


def test_five_percent_is_seen_where_ratios_scatter_by_seven() -> None:
    assert sum(run(1.05, seed, noise=0.05).ended == "faster" for seed in range(200)) >= 190


def test_a_suspicious_output_ends_the_race_without_a_time() -> None:
    rng = random.Random(0)
    result = race(
        {"candidate": contestant(rng, 1e-3), "baseline": contestant(rng, 1e-3)},
        "baseline",
        draw=lambda: None,
        inspect=lambda: {"candidate"},
        rng=rng,
        rules=Rules(),
        margin=0.01,
    )
    assert (result.ended, result.rounds, result.suspects) == ("suspect", 0, {"candidate"})


def test_confirmation_wants_the_interval_over_processes_to_clear_the_margin() -> None:
    def fresh(ratios: list[float]) -> Callable[[int], Race]:
        def one(index: int) -> Race:
            return Race({"candidate": [1.0] * 5, "incumbent": [ratios[index]] * 5})

        return one

    steady = [1.10, 1.11, 1.09, 1.10, 1.10]
    wild = [1.5, 0.7, 1.4, 0.8, 1.3, 0.8, 1.2, 0.9, 1.4, 0.8, 1.2, 0.9]
    assert confirm(fresh(steady), "incumbent", margin=0.01)[2]
    assert not confirm(fresh(wild), "incumbent", margin=0.01)[2]


def test_the_record_survives_and_widens_the_margin_of_a_noisy_machine(tmp_path: Path) -> None:
    record = MachineRecord("m", tmp_path)
    assert record.margin(1e-3) >= 0.01
    assert "no A/A race" in record.sentence(1e-3)
    rng = random.Random(0)
    for _ in range(40):
        record.add("t", 2, 1e-3, rng.gauss(0, 0.10), 12, False)
    again = MachineRecord("m", tmp_path)
    assert again.races == record.races
    assert again.margin(1e-3) > 0.05
    assert again.margin(1e-2) < 0.05, "short calls say nothing of long ones"
    assert again.knows(1e-3) and not again.knows(1e-2)
    for _ in range(20):
        again.add("t", 2, 1e-3, 0.3, 12, True)
    assert "MORE than an honest machine" in again.sentence(1e-3)
    with (tmp_path / "machines" / "m" / "aa.jsonl").open("a") as file:
        file.write('{"when": 1.0, "tas')  # cut short by a crash
    after = MachineRecord("m", tmp_path)
    assert len(after.races) == 60
    after.add("t", 2, 1e-3, 0.1, 12, False)
    (tmp_path / "machines" / "m" / "aa.jsonl").open("ab").write(b"\xff\xfe[1, 2]")
    assert MachineRecord("m", tmp_path).races == after.races, "what follows damage is not lost"


def test_peaks_are_measured_once_and_only_ever_raised(tmp_path: Path) -> None:
    calls = []

    def measure(threads: int) -> Peaks:
        calls.append(threads)
        return Peaks(threads, ((1 << 20, 1e11 / len(calls)), (1 << 29, 5e10 * len(calls))), 1e12, 5e11)

    record = MachineRecord("m", tmp_path)
    first = record.peaks(2, measure)
    assert record.peaks(2, measure) == first and len(calls) == 1
    better = record.peaks(2, measure, again=True)
    assert better.bandwidth == ((1 << 20, 1e11), (1 << 29, 1e11))
    assert MachineRecord("m", tmp_path).peaks(2, measure) == better
    assert math.isclose(better.floor_s(1e9, 0), 0.9 * 1e9 / 1e11)
