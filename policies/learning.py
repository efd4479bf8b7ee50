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

from ke_gym import policies, tasks
from ke_gym.envs import LIVE, REPLAY, catalog, make, make_vec_env
from ke_gym.errors import UserError
from ke_gym.evaluation.evaluation import HARNESS_VERSION
from ke_gym.files import write_whole
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
        needed = policies.find(self.policy).pretrained
        if needed not in (None, self.policy):
            raise UserError(
                f"{self.policy} runs the network of {needed} and learns none itself: train {needed}, then name"
                f" {self.policy}:weights=FILE as the policy"
            )
        if self.policy in NETWORKS and self.policy != "dqn" and self.env == "live" and self.update < 2:
            raise UserError(
                f"n_envs = 1 and horizon = 1 leave {self.policy} one step to learn from; raise one of them"
            )

    @property
    def update(self) -> int:
        """Steps that an update of PPO learns from, over all environments."""
        wanted = max(BATCH, self.n_envs) if self.env == "replay" else self.n_envs * self.horizon[0]
        return wanted // self.n_envs * self.n_envs


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
    checkpoint: str = ""
    """The file of the checkpoint; "" in states of before there was a choice."""
    unscored: dict[str, Any] | None = None
    """The figures of that checkpoint, until it is validated."""
    spent: list[int] = field(default_factory=list)
    """Steps that a bandit has played, per horizon."""

    def save(self, folder: Path) -> None:
        """Write the state, whole or not at all."""
        try:
            write_whole(folder / STATE, json.dumps(asdict(self), indent=1).encode())
        except OSError as error:
            raise UserError(
                f"{folder / STATE} cannot be written ({error.strerror}); choose another --out"
            ) from error

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
        self.names = list(plan.tasks)
        """The tasks learned from: live ones by their names, wherever their files lie."""
        if plan.env == "live":
            self.names = [task.name for spec in plan.tasks for task in tasks.resolve(spec)]
        hashes = {table.task: table.hash for table in self.tables}
        if resume:
            self.state = State.load(folder)
            self._check(hashes)
        else:
            if (folder / STATE).exists() and State.load(folder).steps:
                raise UserError(f"{folder} holds a training; go on with --resume, or choose another --out")
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(
                    f"the folder {folder} cannot be made ({error.strerror}); choose another --out"
                ) from error
            self.state = State(asdict(plan), hashes)
            self.state.save(folder)
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
            if self.state.steps < self.plan.steps or self.state.unscored is not None:
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
            "tasks": self.names,
            "validated_on": self.validated_on,
            "steps": self.state.steps,
            "horizon": list(plan.horizon),
            "reward": plan.reward,
            "seed": plan.seed,
            "harness": HARNESS_VERSION,
        }

    @property
    def checkpoint(self) -> Path:
        """The latest checkpoint."""
        return self.folder / (self.state.checkpoint or f"{CHECKPOINT}{self._suffix}")

    @property
    def _suffix(self) -> str:
        return ".zip" if self.plan.policy in NETWORKS else ".json"

    def kept(self, write: Callable[[Path], None], steps: int, figures: dict[str, Any]) -> None:
        """Write a checkpoint and how far it is, both or none: a checkpoint counts once the state names it."""
        name = f"{CHECKPOINT}-{steps}{self._suffix}"
        temporary = self.folder / f".{name}"
        try:
            write(temporary)
            temporary.replace(self.folder / name)
        except OSError as error:
            raise UserError(
                f"the checkpoint {self.folder / name} cannot be written ({error.strerror})"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
        self.state.steps, self.state.checkpoint, self.state.unscored = steps, name, figures
        self.state.save(self.folder)
        for older in self.folder.glob(f"{CHECKPOINT}*{self._suffix}"):
            if older.name != name:
                older.unlink()

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
        self.state.unscored = None
        self.state.save(self.folder)
        watch(record)

    # Bandits ----------------------------------------------------------------------------------------------

    def _player(self, watch: Watch) -> None:
        """Play one search after the other; whatever the policy learns of them stays."""
        plan = self.plan
        if self.state.steps:
            policy = policies.load(self.checkpoint)
        else:
            policy = policies.make(_untrained(plan.policy), plan.seed)
        policy.training = True
        if self.state.unscored is not None:
            self.validated(policy, self.state.steps, self.state.unscored, watch)
        arguments = {"reward": plan.reward, "parent_rule": policy.parent_rule}
        if plan.env == "replay":
            envs = [
                make(REPLAY, tables=self.tables, horizon=horizon, **arguments) for horizon in plan.horizon
            ]
        else:
            envs = [make(LIVE, tasks=list(plan.tasks), horizon=plan.horizon[0], **arguments, **self.live)]
        # The shorter a search, the more of them, so that all lengths have as many steps.
        spent = self.state.spent if len(self.state.spent) == len(envs) else [0] * len(envs)
        started, steps, recent = time.monotonic() - self.state.seconds, self.state.steps, []
        try:
            while steps < plan.steps:
                next_ = spent.index(min(spent))
                recent.append(play(policy, envs[next_], seed=plan.seed + steps).returned)
                spent[next_] += plan.horizon[next_]
                before, steps = steps, steps + plan.horizon[next_]
                if steps // plan.every > before // plan.every or steps >= plan.steps:
                    self.state.seconds = time.monotonic() - started
                    self.state.spent, figures = spent.copy(), {"reward": float(np.mean(recent))}
                    self.kept(policy.save, steps, figures)
                    self.validated(policy, steps, figures, watch)
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

    def _loaded(self, algorithm: Any, envs: VecEnv) -> Any:
        try:
            return algorithm.load(self.checkpoint, env=envs, device="cpu")
        except Exception as error:  # whatever unpickling a damaged file raises
            envs.close()
            raise UserError(
                f"the checkpoint {self.checkpoint} cannot be read ({error!r}); start a new training"
            ) from error

    def _network(self, watch: Watch) -> None:
        """Let stable-baselines3 train; every so often, take the weights out and validate them."""
        try:
            import torch
            from stable_baselines3.common.callbacks import BaseCallback
        except ImportError as error:
            raise UserError(
                f"training {self.plan.policy} needs stable-baselines3: pip install 'ke-gym[rl]'"
            ) from error

        plan, trainer = self.plan, self
        algorithm, changed = _algorithm(plan.policy)
        envs = self.envs()
        if self.state.steps:
            model: BaseAlgorithm = self._loaded(algorithm, envs)
            # Loading seeds everything as at the start, which would repeat the episodes of then.
            model.set_random_seed(plan.seed + self.state.steps)
        else:
            settings: dict[str, Any] = {"gamma": GAMMA, **changed}
            if plan.policy != "dqn":
                size = minibatch(plan.update)
                settings |= {**PPO, "n_steps": plan.update // plan.n_envs, "batch_size": size}
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
                trainer.kept(self.model.save, self.num_timesteps, figures)
                trainer.validated(export(self.model, plan), self.num_timesteps, figures, watch)

        callback = Validate()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # so small a network learns no faster on more, and slower where others work
        try:
            if self.state.unscored is not None:
                self.validated(export(model, plan), self.state.steps, self.state.unscored, watch)
            if self.state.steps < plan.steps:
                model.learn(
                    plan.steps - self.state.steps, callback, reset_num_timesteps=not self.state.steps,
                    tb_log_name=plan.policy,
                )  # fmt: skip
            if self.state.steps < model.num_timesteps:
                callback.keep()
        finally:
            torch.set_num_threads(threads)
            envs.close()


def minibatch(steps: int) -> int:
    """A quarter of an update's steps, or a little more: no minibatch has one sample, whose spread is not a number."""
    size = max(steps // 4, 2)
    while steps % size == 1:
        size += 1
    return size


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
