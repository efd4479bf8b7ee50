"""Search policies: observation and mask to action. One file each, one line in the registry."""

from __future__ import annotations

import difflib
import inspect
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from ke_gym.errors import UserError
from ke_gym.policies import files
from ke_gym.policies.base import Observation, Policy
from ke_gym.search.run import Transition

__all__ = ["Observation", "Policy", "Transition", "load", "make", "names"]

PRETRAINED = Path(__file__).parent / "pretrained"

_BUILT_IN = {
    "auc_bandit": "ke_gym.policies.auc_bandit:AUCBandit",
    "best_of_n": "ke_gym.policies.best_of_n:BestOfN",
    "beta_thompson": "ke_gym.policies.thompson:BetaThompson",
    "boosted_trees": "ke_gym.policies.boosted_trees:BoostedTrees",
    "discounted_ucb": "ke_gym.policies.discounted_ucb:DiscountedUCB",
    "dqn": "ke_gym.policies.dqn:DQN",
    "epsilon_greedy": "ke_gym.policies.epsilon_greedy:EpsilonGreedy",
    "hill_climb": "ke_gym.policies.hill_climb:HillClimb",
    "islands_map_elites": "ke_gym.policies.islands_map_elites:IslandsMapElites",
    "kernelband": "ke_gym.policies.kernelband:KernelBand",
    "linucb": "ke_gym.policies.linucb:LinUCB",
    "lints": "ke_gym.policies.lints:LinTS",
    "llm_chooser": "ke_gym.policies.llm_chooser:LLMChooser",
    "maskable_ppo": "ke_gym.policies.maskable_ppo:MaskablePPO",
    "masked_random": "ke_gym.policies.masked_random:MaskedRandom",
    "ppo": "ke_gym.policies.ppo:PPO",
    "ppo_guided": "ke_gym.policies.ppo_guided:PPOGuided",
    "puct": "ke_gym.policies.puct:PUCT",
    "rotting": "ke_gym.policies.rotting:Rotting",
    "round_robin": "ke_gym.policies.round_robin:RoundRobin",
    "thompson": "ke_gym.policies.thompson:Thompson",
    "ucb1": "ke_gym.policies.ucb1:UCB1",
    "uct": "ke_gym.policies.uct:UCT",
}


def names() -> list[str]:
    """The known policies: built in, and registered under the entry point group ``ke_gym.policies``."""
    return sorted({*_BUILT_IN, *(point.name for point in entry_points(group="ke_gym.policies"))})


def find(name: str) -> type[Policy]:
    """The class of this name; ``UserError`` names the nearest for an unknown one."""
    if name in _BUILT_IN:
        module, attribute = _BUILT_IN[name].split(":")
        found: type[Policy] = getattr(import_module(module), attribute)
        return found
    for point in entry_points(group="ke_gym.policies"):
        if point.name == name:
            plugin: type[Policy] = point.load()
            return plugin
    near = difflib.get_close_matches(name, names(), n=3, cutoff=0.4) or names()
    raise UserError(f"unknown policy {name!r}; did you mean {', '.join(near)}?")


def make(spec: str, seed: int = 0) -> Policy:
    """The policy that ``spec`` names, with a fresh random stream.

    ``spec`` is a name (``"ucb1"``), a name with options (``"ucb1:c=0.5"``, several separated by commas), or
    the file of a saved policy (``"best.json"``). A policy for which a trained file ships comes from that, unless
    it is asked for ``"linucb:untrained"``.
    Raises ``UserError`` for an unknown name or option (nearest suggested) and an unfit file.
    """
    name, _, text = spec.partition(":")
    if Path(spec).suffix == ".json" and name not in names():
        policy = load(spec)
        policy.reseed(seed)
        return policy
    kind = find(name)
    if text == "untrained":
        return kind(seed)
    options = _options(kind, text)
    shipped = PRETRAINED / f"{kind.pretrained or name}.json"
    if kind.pretrained and "weights" not in options:
        if not shipped.exists():
            raise UserError(
                f"{name} has to be trained before it is used: python scripts/train.py --policy {name} --out"
                f" {name}.json, then name that file as the policy"
            )
        options["weights"] = str(shipped)
        return kind(seed, **options)
    if not shipped.exists() or kind.pretrained:
        return kind(seed, **options)
    policy = load(shipped)
    policy.reseed(seed)
    for option, value in options.items():
        if option not in policy.learned:
            raise UserError(
                f"the option {option} of {name} is for training, and the one that ships is trained; its options are"
                f" {', '.join(o for o in options_of(kind) if o in policy.learned)}, or train your own:"
                f" python scripts/train.py --policy {name}"
            )
        setattr(policy, option, value)
    return policy


def load(path: str | Path) -> Policy:
    """The policy that ``Policy.save`` wrote to ``path``, ready to go on exactly where it was."""
    data = files.read(path)
    return find(data.policy).from_file(data)


def options_of(kind: type[Policy]) -> dict[str, Any]:
    """The options of a policy and their defaults."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(kind.__init__).parameters.items()
        if name not in ("self", "seed")
    }


def _options(kind: type[Policy], text: str) -> dict[str, Any]:
    """Constructor arguments from ``"c=0.5,soft_mask=1"``, converted to the type of their defaults."""
    known = options_of(kind)
    options: dict[str, Any] = {}
    for item in filter(None, text.split(",") if text != "untrained" else ()):
        name, equals, value = item.partition("=")
        if name not in known or not equals:
            hint = f"its options are {', '.join(known)}" if known else "it has no options"
            raise UserError(
                f"{kind.name} has no option {item!r}; {hint} (for example {kind.name}:name=value)"
            )
        try:
            options[name] = type(known[name])(value)
        except ValueError:
            raise UserError(
                f"the option {name} of {kind.name} is a {type(known[name]).__name__}, not {value!r}"
            ) from None
        if fault := kind.fault(name, options[name]):
            raise UserError(
                f"the option {name} of {kind.name} has to be {fault}, not {value!r}; its default is {known[name]}"
            )
    return options
