"""Training policies: networks by stable-baselines3 over batched environments, bandits by playing searches.

Either way the result is one of this project's policy files. While it trains, a policy is validated on tables (or
tasks) that it does not learn from, and the best one so far is kept.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ke_gym import policies
from ke_gym.envs import LIVE, REPLAY, catalog, make, make_vec_env
from ke_gym.errors import UserError
from ke_gym.evaluation.evaluation import HARNESS_VERSION
from ke_gym.policies import files
from ke_gym.policies.base import Policy
from ke_gym.policies.network import NetworkPolicy
from ke_gym.policies.playing import play
from ke_gym.policies.yardstick import Yardstick
from ke_gym.search.reward import Kind

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.vec_env import VecEnv

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "maskable_ppo": ("sb3_contrib:MaskablePPO", {}),
    "ppo": ("stable_baselines3:PPO", {}),
    "dqn": (
        "stable_baselines3:DQN",
        {"learning_starts": 5000, "buffer_size": 200_000, "train_freq": 4, "gradient_steps": 8, "batch_size": 256,
         "target_update_interval": 2000, "exploration_fraction": 0.3, "learning_rate": 5e-4},
    ),
}  # fmt: skip
"""Who trains which network, and how it differs from ``PPO``'s settings below."""
PPO: dict[str, Any] = {"n_epochs": 4, "ent_coef": 0.01, "learning_rate": 5e-4, "gae_lambda": 0.95}
GAMMA = 0.95
BATCH = 8192
"""Steps of a PPO update on a replay, over all environments."""
SMOOTHED = 3
"""Validations that a score is averaged over."""
CHECKPOINT, STATE, BEST = "checkpoint", "state.json", "best.json"

Watch = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Plan:
    """What a training is; a resumed one has to be the same, but for ``steps``."""

    policy: str
    env: Literal["replay", "live"]
    tasks: tuple[str, ...]
    validation: tuple[str, ...]
    steps: int
    horizon: tuple[int, ...]
    """Steps of a search; of several, searches of all lengths take part alike."""
    reward: Kind
    seed: int
    n_envs: int
    every: int
    """Steps between validations."""

    def __post_init__(self) -> None:
        policies.find(self.policy)
        for name in ("steps", "n_envs", "every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)} trains nothing; give a positive number")
        if min(self.horizon, default=0) < 1:
            raise UserError(f"horizon = {self.horizon} trains nothing; give positive numbers")
        if self.env == "live" and len(self.horizon) > 1:
            raise UserError("live searches have one horizon; give a single number")


@dataclass
class State:
    """How far a training is, kept beside its checkpoints."""

    plan: dict[str, Any]
    tables: dict[str, str]
    steps: int = 0
    seconds: float = 0.0
    best: float = float("-inf")
    """The highest smoothed validation score so far."""
    wandb: str | None = None
    history: list[dict[str, Any]] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write the state, whole or not at all."""
        temporary = folder / f".{STATE}"
        temporary.write_text(json.dumps(asdict(self), indent=1))
        temporary.replace(folder / STATE)

    @classmethod
    def load(cls, folder: Path) -> State:
        """The state in ``folder``; ``UserError`` if there is none."""
        try:
            return cls(**json.loads((folder / STATE).read_text()))
        except FileNotFoundError:
            raise UserError(f"{folder} holds no training to resume") from None
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{folder / STATE} is damaged ({error}); start a new training") from error


class Trainer:
    """One training: ``run`` it, interrupt it, ``resume`` it; ``best`` is the policy to use."""

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        *,
        resume: bool = False,
        tensorboard: Path | None = None,
        live: dict[str, Any] | None = None,
    ) -> None:
        self.plan, self.folder, self.tensorboard, self.live = plan, folder, tensorboard, live or {}
        self.tables = catalog.load(plan.tasks) if plan.env == "replay" else []
        held = catalog.load(plan.validation) if plan.validation else []
        self.yardstick = Yardstick(held, plan.horizon) if held else None
        self.validated_on = [table.task for table in held]
        hashes = {table.task: table.hash for table in self.tables}
        if resume:
            self.state = State.load(folder)
            self._check(hashes)
        else:
            if (folder / STATE).exists():
                raise UserError(f"{folder} holds a training; go on with --resume, or choose another --out")
            folder.mkdir(parents=True, exist_ok=True)
            self.state = State(asdict(plan), hashes)
        self.state.plan["steps"] = plan.steps

    def _check(self, hashes: dict[str, str]) -> None:
        """``UserError`` naming what differs from the training that is to be resumed."""
        mine, theirs = json.loads(json.dumps(asdict(self.plan))), self.state.plan
        differs = [name for name in mine if name != "steps" and mine[name] != theirs.get(name)]
        if differs:
            what = ", ".join(f"{name} = {theirs.get(name)!r}" for name in differs)
            raise UserError(
                f"the training in {self.folder} has {what}; resume it with the same, or start a new one"
            )
        files.check_tables(str(self.folder), {"tables": self.state.tables}, hashes)

    def run(self, watch: Watch = lambda record: None) -> str:
        """Train to the end; returns ``"complete"``, or ``"interrupted"`` after Ctrl-C (then resumable)."""
        train = self._network if self.plan.policy in NETWORKS else self._player
        try:
            if self.state.steps < self.plan.steps:
                train(watch)
        except KeyboardInterrupt:
            return "interrupted"
        return "complete"

    @property
    def best(self) -> Path:
        """The file of the best policy so far."""
        return self.folder / BEST

    @property
    def trained_on(self) -> dict[str, Any]:
        """What the policy's file says of its training."""
        plan = self.plan
        return {
            "env": plan.env,
            "tables": self.state.tables,
            "tasks": list(plan.tasks),
            "validated_on": self.validated_on,
            "steps": self.state.steps,
            "horizon": list(plan.horizon),
            "reward": plan.reward,
            "seed": plan.seed,
            "harness": HARNESS_VERSION,
        }

    def validated(self, policy: Policy, steps: int, figures: dict[str, Any], watch: Watch) -> None:
        """Score the policy, keep it unless an earlier one was better, and write down how far the training is.

        Scores are averaged over the latest validations; of policies that differ by less than the score's noise the
        later one is kept, which has seen more.
        """
        self.state.steps = steps
        policy.trained_on = self.trained_on
        record = {"steps": steps, "seconds": round(self.state.seconds, 1), **figures}
        score, noise = float(steps), 0.0  # without a validation, the latest is the best
        if self.yardstick is not None:
            record |= {f"validation_{name}": value for name, value in self.yardstick.score(policy).items()}
            earlier = [past["validation_auc"] for past in self.state.history[1 - SMOOTHED :]]
            score, noise = float(np.mean([*earlier, record["validation_auc"]])), record["validation_noise"]
        record["best"] = score >= self.state.best - noise or not self.best.exists()
        self.state.best = max(self.state.best, score)
        if record["best"]:
            policy.trained_on = {**policy.trained_on, "validation_auc": record.get("validation_auc")}
            policy.save(self.best)
        self.state.history.append(record)
        self.state.save(self.folder)
        watch(record)

    # Bandits ----------------------------------------------------------------------------------------------

    def _player(self, watch: Watch) -> None:
        """Play one search after the other; whatever the policy learns of them stays."""
        plan, saved = self.plan, self.folder / f"{CHECKPOINT}.json"
        policy = (
            policies.load(saved) if self.state.steps else policies.make(_untrained(plan.policy), plan.seed)
        )
        policy.training = True
        arguments = {"reward": plan.reward, "parent_rule": policy.parent_rule}
        if plan.env == "replay":
            envs = [
                make(REPLAY, tables=self.tables, horizon=horizon, **arguments) for horizon in plan.horizon
            ]
        else:
            envs = [make(LIVE, tasks=list(plan.tasks), horizon=plan.horizon[0], **arguments, **self.live)]
        # The shorter a search, the more of them, so that all lengths have as many steps.
        spent = [0] * len(envs)
        started, steps, recent = time.monotonic() - self.state.seconds, self.state.steps, []
        try:
            while steps < plan.steps:
                next_ = spent.index(min(spent))
                recent.append(play(policy, envs[next_], seed=plan.seed + steps).returned)
                spent[next_] += plan.horizon[next_]
                before, steps = steps, steps + plan.horizon[next_]
                if steps // plan.every > before // plan.every or steps >= plan.steps:
                    self.state.seconds = time.monotonic() - started
                    policy.save(saved)
                    self.validated(policy, steps, {"reward": float(np.mean(recent))}, watch)
                    recent = []
        finally:
            for env in envs:
                env.close()

    # Networks ---------------------------------------------------------------------------------------------

    def envs(self) -> VecEnv:
        """What a network is trained on."""
        plan = self.plan
        seed = plan.seed + self.state.steps
        arguments: dict[str, Any] = {"seed": seed, "reward": plan.reward}
        if plan.env == "replay":
            arguments |= {"tables": self.tables, "horizon": plan.horizon}
        else:
            arguments |= {"tasks": list(plan.tasks), "horizon": plan.horizon[0], **self.live}
        return training_envs(plan.policy, LIVE if plan.env == "live" else REPLAY, plan.n_envs, **arguments)

    def _network(self, watch: Watch) -> None:
        """Let stable-baselines3 train; every so often, take the weights out and validate them."""
        try:
            import torch
            from stable_baselines3.common.callbacks import BaseCallback
        except ImportError as error:
            raise UserError(
                f"training {self.plan.policy} needs stable-baselines3: pip install 'ke-gym[rl]'"
            ) from error

        plan, saved, trainer = self.plan, self.folder / f"{CHECKPOINT}.zip", self
        algorithm, changed = _algorithm(plan.policy)
        envs = self.envs()
        if self.state.steps:
            model: BaseAlgorithm = algorithm.load(saved, env=envs, device="cpu")
        else:
            settings: dict[str, Any] = {"gamma": GAMMA, **changed}
            if plan.policy != "dqn":
                batch = max(BATCH, plan.n_envs) if plan.env == "replay" else plan.n_envs * plan.horizon[0]
                settings |= {**PPO, "n_steps": batch // plan.n_envs, "batch_size": max(batch // 4, 2)}
            log = str(self.tensorboard) if self.tensorboard is not None else None
            model = algorithm(
                "MlpPolicy", envs, seed=plan.seed, device="cpu", tensorboard_log=log, **settings
            )
        started = time.monotonic() - self.state.seconds

        class Validate(BaseCallback):
            """Not at every step, but when the next multiple of ``every`` is passed."""

            due = (self.state.steps // plan.every + 1) * plan.every

            def _on_step(self) -> bool:
                if self.num_timesteps >= self.due:
                    self.due = (self.num_timesteps // plan.every + 1) * plan.every
                    self.keep()
                return True

            def keep(self) -> None:
                recent = [info["r"] for info in self.model.ep_info_buffer or ()]
                figures = {"reward": float(np.mean(recent)) if recent else 0.0}
                trainer.state.seconds = time.monotonic() - started
                self.model.save(saved)
                trainer.validated(export(self.model, plan), self.num_timesteps, figures, watch)

        callback = Validate()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # so small a network learns no faster on more, and slower where others work
        try:
            model.learn(
                plan.steps - self.state.steps, callback, reset_num_timesteps=not self.state.steps,
                tb_log_name=plan.policy,
            )  # fmt: skip
            if self.state.steps < model.num_timesteps:
                callback.keep()
        finally:
            torch.set_num_threads(threads)
            envs.close()


def training_envs(policy: str, env_id: str, n_envs: int, *, seed: int, **arguments: Any) -> VecEnv:
    """What the network ``policy`` is trained on: ``TrainingVecEnv``, and legal actions for those that know no masks."""
    made = make_vec_env(env_id, n_envs, seed=seed, **arguments)
    from ke_gym.envs.vector import FlatVecObservation, LegalActionVecEnv, TrainingVecEnv

    made = TrainingVecEnv(FlatVecObservation(made), seed)
    return made if policy == "maskable_ppo" else LegalActionVecEnv(made, seed)


def _untrained(name: str) -> str:
    return f"{name}:untrained" if ":" not in name else name


def _algorithm(name: str) -> tuple[Any, dict[str, Any]]:
    place, changed = NETWORKS[name]
    module, kind = place.split(":")
    try:
        return getattr(import_module(module), kind), changed
    except ImportError as error:
        raise UserError(f"training {name} needs {module}: pip install 'ke-gym[rl]'") from error


def export(model: Any, plan: Plan) -> Policy:
    """The trained network as a policy of this project: weights only, run by NumPy."""
    made = policies.find(plan.policy)(plan.seed)
    assert isinstance(made, NetworkPolicy)
    if plan.policy == "dqn":
        modules = list(model.q_net.q_net)
    else:
        modules = [*model.policy.mlp_extractor.policy_net, model.policy.action_net]
    made.layers = [
        [module.weight.detach().numpy().copy(), module.bias.detach().numpy().copy()]
        for module in modules
        if hasattr(module, "weight")
    ]
    return made
