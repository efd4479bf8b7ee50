"""The main job: a task in, a faster, proven kernel and an honest report out."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ke_gym import proposers
from ke_gym.candidate import Candidate
from ke_gym.codegen.capture import capture
from ke_gym.codegen.errors import CodegenError
from ke_gym.codegen.features import Features
from ke_gym.codegen.program import Program
from ke_gym.errors import UserError
from ke_gym.evaluation.evaluation import Evaluation
from ke_gym.evaluation.evaluator import Evaluator
from ke_gym.evaluation.opening import kernel_language, open_evaluator
from ke_gym.evaluation.selfcheck import Proof
from ke_gym.files import write_whole
from ke_gym.knowledge.learned import FOLDER, Lesson, distill, write_back
from ke_gym.languages.base import BuildError
from ke_gym.languages.plan import TensorSpec
from ke_gym.proposers import LLM, Proposer, Usage, warm
from ke_gym.proposers.lessons import generalize
from ke_gym.report import write_report
from ke_gym.search.budget import Budget
from ke_gym.search.observation import Surroundings
from ke_gym.search.result import Result
from ke_gym.search.run import Paying, Watch, run
from ke_gym.search.session import Session
from ke_gym.search.store import Setting, Store
from ke_gym.tasks import Task
from ke_gym.tasks.loader import built_in

RUN_FORMAT = 1
RUN_FILE = "run.json"
TASK_FILE = "task.bin"
FINALISTS = 3
AHEAD = 2
"""What several GPUs have in flight each, over what one has: candidates are told in order, so while one is confirmed (5 s)
the others judge what was asked ahead. (Simulated with the benchmark's mix: four GPUs do 3.0 instead of 2.2 times one's.)"""


@dataclass(frozen=True)
class RunSettings:
    """What makes a search what it is; kept in the run's folder so that it can be resumed."""

    format: int
    session: str
    store: str
    spec: str
    task_id: str
    target: str
    baseline: str
    policy: str
    proposer: str
    seed: int
    threads: int | None
    workers: int
    llm: dict[str, Any] | None = None
    exchange: str = ""
    learned: bool = True
    warm_start: float = 0.0
    prices: str = ""
    language: str = ""
    limits: dict[str, Any] | None = None

    @property
    def budget(self) -> Budget | None:
        """The limits that were last given; None for runs from before they were kept."""
        return None if self.limits is None else Budget(**self.limits)


def optimize(
    task: Task | nn.Module | str | Path,
    example_inputs: Any = None,
    *,
    budget: int | None = None,
    seconds: float | None = None,
    dollars: float | None = None,
    target: str = "cpu",
    language: str = "",
    baseline: str = "eager",
    policy: str = "epsilon_greedy",
    proposer: str = "rewriter",
    seed: int = 0,
    threads: int | None = None,
    workers: int = 2,
    llm: LLM | None = None,
    exchange: str | Path | None = None,
    learned: bool = True,
    warm_start: float = 0.0,
    inspect: bool = True,
    out: str | Path = "runs",
    resume: str | Path | None = None,
    watch: Watch | None = None,
) -> Result:
    """Search for a faster kernel for one task.

    Args:
        task: a live ``nn.Module`` (with ``example_inputs``: a tensor or a sequence of positional arguments),
            or a suite task's name, a KernelBench-format file, or a ``Task``.
        budget, seconds, dollars: limits (``budget``: evaluations); the first that is reached ends the search. Left out,
            they are what they were for a run that is resumed, and 60 evaluations for a new one.
        target: the device to optimize for.
        language: what kernels are generated in: ``"cpp"`` on a CPU; on a GPU ``"triton"`` (the default) or ``"cuda"``.
        baseline: what speedups are against: ``"eager"``, ``"compile"`` (``torch.compile``) or ``"max-autotune"``
            (its mode of that name).
        policy: a name from ``ke_gym.policies`` or a saved policy's file.
        proposer: a name from ``ke_gym.proposers``, or several, as "rewriter,openai".
        seed: of the search's choices; equal seeds repeat a search.
        threads: CPU threads of every kernel and of the reference; all cores by default.
        workers: candidates in flight at once; where there are several GPUs, twice as many for each.
        llm: how models are asked, for the proposer ``openai``.
        exchange: a folder shared with a machine that has the GPU and serves it there (``evaluate.py --serve``).
        learned: add what this search teaches to the lessons beside the store (a model that proposes also puts them
            in words), and tell models of earlier ones.
        warm_start: how often a draft is the best recorded kernel of this or a similar task, from 0 to 1.
        inspect: look at the winner with what the target has besides races (on a GPU ``compute-sanitizer`` and ``ncu``,
            up to a minute).
        out: the folder in which the run's own folder is made.
        resume: a run's folder: continue that search with what it recorded, and with its own target, language, baseline,
            policy, proposer, seed and threads.
        watch: hooks for progress.

    Raises:
        UserError: for bad input, in one sentence.
    """
    limits = Budget.asked(budget, seconds, dollars)
    warm.check(warm_start)
    check_seed(seed)
    loaded = _task(task, example_inputs)
    if resume is not None:
        run_dir, settings = read_run(resume)
        limits = Budget.asked(budget, seconds, dollars, settings.budget)
        loaded = _recorded_task(loaded, run_dir, settings)
        settings = replace(settings, prices=(llm.prices if llm else "") or settings.prices)
        if settings.llm is not None:
            # A recording is of one run only.
            again = replace(LLM.from_dict(settings.llm), record="", prices=settings.prices)
            proposers.check(settings.proposer, again)
            settings = replace(settings, llm=again.to_dict())
    else:
        language = kernel_language(target, language)
        proposers.check(proposer, llm or LLM(), dollars)
        run_dir = new_run_dir(out, loaded.name)
        spec = loaded.name if loaded.payload else loaded.path
        settings = RunSettings(
            RUN_FORMAT, uuid.uuid4().hex[:16], "", spec, loaded.id, target, baseline, policy, proposer, seed,
            threads, workers, llm.to_dict() if llm and "openai" in proposers.members(proposer) else None,
            str(Path(exchange).absolute()) if exchange else "", learned, warm_start, llm.prices if llm else "", language,
        )  # fmt: skip
    module = task if isinstance(task, nn.Module) else None
    try:
        return _search(loaded, module, settings, limits, run_dir, watch or Watch(), inspect)
    except (UserError, KeyboardInterrupt):
        if not (run_dir / RUN_FILE).exists():  # refused or interrupted before it began
            shutil.rmtree(run_dir)
        raise


def _task(task: Task | nn.Module | str | Path, example_inputs: Any) -> Task:
    if isinstance(task, nn.Module):
        if example_inputs is None:
            raise UserError(
                "a module needs example inputs: ke_gym.optimize(module, example_inputs), a tensor or a list"
                " of the positional arguments"
            )
        return Task.from_module(task, example_inputs)
    if example_inputs is not None:
        raise UserError("example inputs go with a module; a task file brings its own (get_inputs)")
    return task if isinstance(task, Task) else Task.load(task)


def recorded_task(run_dir: Path, settings: RunSettings) -> Task:
    """The task of a run: the live module pickled with it, or what its spec names now.

    ``UserError`` if the spec names nothing any more, or the pickle cannot be read.
    """
    if not (run_dir / TASK_FILE).exists():
        return Task.load(settings.spec)
    try:
        return Task.from_bytes((run_dir / TASK_FILE).read_bytes())
    except Exception as error:  # whatever a damaged pickle brings
        raise UserError(f"{run_dir / TASK_FILE} is damaged: {error}; start a new run") from error


def _recorded_task(task: Task, run_dir: Path, settings: RunSettings) -> Task:
    """The task a run was made for, if ``task`` is still that one.

    A live module pickles differently from time to time, so its run keeps the pickled task, and any module
    with the same parameters will do.
    """
    recorded = task
    if task.payload and settings.spec == task.name and (run_dir / TASK_FILE).exists():
        recorded = Task.from_bytes((run_dir / TASK_FILE).read_bytes())
        states = [t.reference(t.contract(settings.target)).state for t in (task, recorded)]
        mine, theirs = ({name: TensorSpec.of(tensor) for name, tensor in s.items()} for s in states)
        if mine != theirs:
            recorded = task
    if recorded.id != settings.task_id:
        raise UserError(
            f"{run_dir} is a run of {settings.spec}, which has changed or is not {task.name}; start a new run"
        )
    return recorded


def _search(
    task: Task,
    module: nn.Module | None,
    settings: RunSettings,
    limits: Budget,
    run_dir: Path,
    watch: Watch,
    inspect: bool,
) -> Result:
    # Policies lie above this package; the main job is the one place that reaches up for them.
    from ke_gym import policies

    policy = policies.make(settings.policy, settings.seed)
    _check_store(settings, run_dir)
    begin = time.perf_counter()
    if settings.target != "cpu" and "rewriter" in proposers.members(settings.proposer):
        # While processes start on the device; a CPU's measure it meanwhile, and want it for themselves.
        threading.Thread(target=_capture_ahead, args=(task, settings.language), daemon=True).start()
    with (
        Store(settings.store or None) as store,
        open_evaluator(
            task,
            settings.target,
            settings.baseline,
            settings.threads,
            exchange=Path(settings.exchange) if settings.exchange else None,
        ) as evaluator,
        closing(_proposer(task, settings, evaluator, run_dir, store)) as proposer,
    ):
        evaluator.account.add("opening", time.perf_counter() - begin)
        setting = Setting(
            task.id, settings.target, evaluator.facts.fingerprint, settings.baseline, evaluator.threads
        )
        proof = proven(task, store, setting, evaluator)
        if proof is not None:
            watch.proved(task, proof)
        session = Session(
            store,
            settings.session,
            setting,
            proposer,
            budget=limits,
            seed=settings.seed,
            parent_rule=policy.parent_rule,
            settings={"policy": settings.policy, "workers": settings.workers},
            surroundings=Surroundings.of(evaluator),
        )
        if isinstance(policy, Paying):
            policy.fund(session.purse, settings.prices)
        store.add_task(task)
        if task.payload:
            write_whole(run_dir / TASK_FILE, task.to_bytes())
        write_run(run_dir, replace(settings, store=str(store.path.absolute()), limits=asdict(limits)))
        evaluate = remembering(store, setting, evaluator)
        workers = settings.workers * evaluator.devices
        if evaluator.devices > 1:
            workers *= AHEAD
        stopped = run(session, policy, evaluate, workers=workers, watch=watch)
        if stopped != "interrupted":
            try:
                confirm_best(session, evaluator, watch, inspect)
            except KeyboardInterrupt:
                stopped = "interrupted"
        result = _result(task, module, session, evaluator, stopped, run_dir, proof)
        result.write()  # before a model is asked for lessons, which may take minutes
        lessons = distill(settings.session, task.name, task.family, store.nodes(settings.session))
        if settings.learned and stopped != "interrupted":
            try:
                lessons = _in_words(lessons, task, settings, session, run_dir)
            except KeyboardInterrupt:
                stopped = "interrupted"
            result = replace(result, stopped=stopped, usage=session.usage, dollars=session.spent.dollars)
            result.write()
        write_report(result, session, evaluator)
        if settings.learned:
            write_back(store.path.parent / FOLDER, lessons)
    return result


def _capture_ahead(task: Task, language: str) -> None:
    """Have the task's program at hand; what is wrong with it is said when it is asked for."""
    with contextlib.suppress(UserError):
        Program.for_language(task, language)


def _in_words(
    found: list[Lesson], task: Task, settings: RunSettings, session: Session, run_dir: Path
) -> list[Lesson]:
    """The lessons with a model's sentences, where the session had a model that is not a recording."""
    llm = LLM.from_dict(settings.llm) if settings.llm else None
    if llm is None or llm.record or llm.replay:
        return found

    def book(dollars: float, usage: Usage) -> None:
        session.book("lessons", dollars, usage)

    return generalize(found, task.name, llm, session.purse, book, run_dir / "transcripts")


def _check_store(settings: RunSettings, run_dir: Path) -> None:
    """``UserError`` if a run is to be continued whose search is no longer in its store."""
    if not settings.store:
        return
    if Path(settings.store).exists():
        with Store(settings.store) as store:
            if store.session_settings(settings.session) is not None:
                return
    raise UserError(
        f"{run_dir} cannot be continued: the store {settings.store} no longer holds its search; start a new run"
    )


def _proposer(
    task: Task, settings: RunSettings, evaluator: Evaluator, run_dir: Path, store: Store
) -> Proposer:
    llm = LLM.from_dict(settings.llm) if settings.llm else None
    # Lessons grow from search to search: what is to be replayed does without.
    if llm and settings.learned and not (llm.record or llm.replay):
        llm = replace(llm, learned=str(store.path.parent / FOLDER))
    made = proposers.make(
        settings.proposer,
        task,
        settings.language,
        evaluator=evaluator,
        llm=llm,
        transcripts=run_dir / "transcripts",
    )
    graph = _graph(task, settings.target, made, store)
    if not settings.warm_start:
        return made
    kernels = warm.choose(task, settings.target, store.leaders(settings.target), graph)
    return warm.WarmStart(made, kernels, settings.warm_start)


def proven(task: Task, store: Store, setting: Setting, evaluator: Evaluator) -> Proof | None:
    """How far a user's own task can be trusted on this device, found out once per task text and machine.

    None for the built-in suite, which is checked before it ships, and where it cannot be tried. Raises
    ``UserError`` for a task by which a kernel that computes nothing would be accepted, or none at all.
    """
    if built_in(task):
        return None
    proof = store.proof(setting)
    if proof is None:
        proof = evaluator.prove()
        if proof is None:
            return None
        store.add_proof(setting, proof)
    if proof.useless:
        remedy = (
            "its outputs must depend on inputs and parameters alone (no dropout, no random numbers)"
            if proof.rejected
            else "give it inputs that its outputs depend on, and no tolerance that hides errors"
        )
        raise UserError(f"{task.name} cannot judge a kernel: {proof}; {remedy}")
    return proof


def _graph(task: Task, target: str, proposer: Proposer, store: Store) -> Features | None:
    """What the task's graph is made of: as recorded, as the proposer captured it, or captured now, once for all
    searches; None for a module that cannot be captured."""
    known = store.features(task.id, target)
    if known is not None:
        return known
    try:
        graph = proposer.features or Features.of(capture(task, task.contract(target)))
    except CodegenError:
        return None
    store.add_features(task.id, target, graph)
    return graph


def remembering(
    store: Store, setting: Setting, evaluator: Evaluator
) -> Callable[[Candidate, Candidate | None], Evaluation]:
    """``evaluator.evaluate``, except that a binary judged before is not judged again.

    Different sources often compile to the same machine code: the second takes over the first one's times, as
    no gain. It waits for them if the first one is being judged.
    """
    judged: dict[str, Future[Evaluation]] = {}
    lock = threading.Lock()

    def evaluate(candidate: Candidate, rival: Candidate | None) -> Evaluation:
        try:
            binary = evaluator.build(candidate).binary_id
        except BuildError:
            return evaluator.evaluate(candidate, rival)
        with lock:
            twin = store.evaluation_of_binary(setting, binary)
            first = judged.get(binary)
            mine: Future[Evaluation] = judged.setdefault(binary, Future())
        if twin is None and first is not None:
            twin = first.result()
        if twin is not None:
            return twin.alone().replace(candidate=candidate.id)
        try:
            evaluation = evaluator.evaluate(candidate, rival)
        except BaseException as error:
            with lock:
                del judged[binary]
            mine.set_exception(error)
            raise
        mine.set_result(evaluation)
        return evaluation

    return evaluate


def confirm_best(session: Session, evaluator: Evaluator, watch: Watch, inspect: bool = True) -> None:
    """Race the closest challengers against the best, then measure the winner anew, and ``inspect`` it.

    A search takes over what is faster by a margin; versions that are level with its best by less than that, or were raced
    too shortly, race it once more here, two by two. The best of many noisy measurements flatters itself: what is reported was
    measured after the choice. A winner that fails this time gives way to the one it took the place of, and that to the next
    fastest; if ``FINALISTS`` in a row fail, nothing is best.
    """
    tree = session.tree
    if tree.best is None:
        return
    finalists = [tree.best]
    raced = {tree.best.evaluation.binary}
    ranked = sorted(tree.correct(), key=lambda node: -node.speedup)
    for node in ranked[:FINALISTS]:
        high = (node.evaluation.speedup_ci or (0.0, 0.0))[1]
        if node.evaluation.binary not in raced and max(high, node.speedup) > tree.best.speedup:
            watch.confirming(session, node)
            raced.add(node.evaluation.binary)
            if evaluator.ahead(node.candidate, finalists[0].candidate):
                finalists.insert(0, node)
    first = {node.number for node in finalists}
    finalists += [node for node in ranked if node.number not in first]
    for node in finalists[:FINALISTS]:
        watch.confirming(session, node)
        judge = evaluator.final if inspect else evaluator.evaluate
        final = replace(node, evaluation=judge(node.candidate))
        if final.correct and final.evaluation.speedup_ci is not None:
            tree.crown(final)
            return
        tree.depose(final)


def _result(
    task: Task,
    module: nn.Module | None,
    session: Session,
    evaluator: Evaluator,
    stopped: str,
    run_dir: Path,
    proof: Proof | None,
) -> Result:
    best = session.tree.best
    artifact = None
    if best is not None:
        artifact = evaluator.settled(best.candidate)
        session.store.add_artifact(artifact.binary_id, artifact.to_bytes())
    contract = evaluator.judge.shapes[evaluator.contract]
    floor_s = evaluator.peaks.floor_s(contract.work.bytes, contract.work.floor_flops)
    correct = sum(node.correct for node in session.tree)
    return Result(
        task=task,
        target=evaluator.target,
        baseline=evaluator.baseline,
        best=best.candidate if best else None,
        evaluation=best.evaluation if best else None,
        artifact=artifact,
        evaluations=len(session.tree),
        valid=correct / max(len(session.tree), 1),
        seconds=session.spent.seconds,
        seed_correct=next((node.correct for node in session.tree), False),
        stopped=stopped,
        floor_ms=1e3 * floor_s,
        run_dir=run_dir,
        module=module,
        usage=session.usage,
        dollars=session.spent.dollars,
        proof=proof,
        refused=refused(session),
        time=evaluator.account.spent(),
    )


def refused(session: Session) -> dict[str, int]:
    """Why candidates of a search were not taken: outcome → how many; "no gain": correct, but not faster."""
    reasons = (
        node.evaluation.outcome if not node.correct else "no gain"
        for node in session.tree
        if not (node.correct and node.evaluation.improved)
    )
    return dict(sorted(Counter(reasons).items()))


# Run folders ----------------------------------------------------------------------------------------------


def check_seed(seed: int) -> None:
    """``UserError`` for a seed that no generator takes."""
    if seed < 0:
        raise UserError(f"seed = {seed} is no seed; give a whole number of at least 0")


def check_out(out: Path) -> None:
    """``UserError`` unless runs can be written to ``out``, which is made if it is missing."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(
            f"the output folder {out} cannot be written ({error.strerror}); choose another with --out"
        ) from error


def new_run_dir(out: str | Path, name: str) -> Path:
    """A fresh folder ``out/<time>-<name>``; ``UserError`` if it cannot be made."""
    check_out(Path(out))
    safe = "".join(c if c.isalnum() or c in "-_" else "-" for c in name)
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{safe}"
    for attempt in itertools.count():
        path = Path(out) / (stem if attempt == 0 else f"{stem}-{attempt}")
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            break
    return path


def write_run(run_dir: Path, settings: RunSettings) -> None:
    """Keep the settings in the run's folder, in one step."""
    write_whole(run_dir / RUN_FILE, json.dumps(asdict(settings), indent=1).encode())


def read_run(path: str | Path) -> tuple[Path, RunSettings]:
    """The folder and settings of an earlier run; ``UserError`` if it is none, or of another version."""
    folder = Path(path)
    try:
        data = json.loads((folder / RUN_FILE).read_text())
    except FileNotFoundError:
        raise UserError(f"{folder} is not a run's folder: it has no {RUN_FILE}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / RUN_FILE} cannot be read: {error}") from error
    if not isinstance(data, dict) or data.get("format") != RUN_FORMAT:
        found = data.get("format") if isinstance(data, dict) else None
        raise UserError(
            f"{folder} was recorded by another version (format {found}, this is {RUN_FORMAT});"
            " start a new run"
        )
    try:
        settings = RunSettings(**data)
        settings.budget  # noqa: B018
    except (TypeError, UserError) as error:
        raise UserError(f"{folder / RUN_FILE} is damaged: {error}; start a new run") from error
    # Runs from before there was a choice have the target's default.
    return folder, replace(settings, language=kernel_language(settings.target, settings.language))
