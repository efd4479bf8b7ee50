"""``Program``: a task's graphs, its first schedules, and the kernel modules they print to."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from ke_gym.codegen import channels_last, fusion, module, module_cuda, module_triton, preparation, streams
from ke_gym.codegen.capture import capture
from ke_gym.codegen.errors import CodegenError, Illegal
from ke_gym.codegen.features import Features
from ke_gym.codegen.graph import HOPPER, Graph, Node
from ke_gym.codegen.lower import lower
from ke_gym.codegen.schedule import Schedule
from ke_gym.codegen.split_reductions import for_gpu

if TYPE_CHECKING:
    from ke_gym.tasks import Task

LANGUAGES = {
    "cpp": ("cpu", module.emit),
    "triton": ("cuda", module_triton.emit),
    "cuda": ("cuda", module_cuda.emit),
}


_ALONE = threading.Lock()
_LAST: dict[tuple[str, str, str], Program] = {}


@dataclass(frozen=True, eq=False)
class Program:
    """What a task computes, one graph per public shape set (the contract first), and the first one's features."""

    name: str
    graphs: tuple[Graph, ...]
    features: Features | None = None

    @classmethod
    def from_task(
        cls, task: Task, target: str = "cpu", language: Literal["triton", "cuda"] = "triton"
    ) -> Program:
        """Capture and lower; ``language`` is what kernels of a GPU are printed in.

        Raises ``CodegenError`` naming what ``torch.export`` refused and where.
        """
        graphs: list[Graph] = []
        features = None
        for shape_set in task.public_shapes(target):
            try:
                captured = capture(task, shape_set, "cpp" if target == "cpu" else language)
                features = features or Features.of(captured)
                graph = lower(captured, task.precision)
                nodes = [step for step in graph.steps.values() if isinstance(step, Node)]
                if any(var.size == 0 for node in nodes for var in (*node.vars, *node.rvars)):
                    raise Illegal("tensors without elements")
                if target == "cuda":
                    graph = for_gpu(graph, language)
                graphs.append(graph)
            except Illegal as reason:
                raise CodegenError(f"{task.name}: {reason}; no kernel can be generated") from reason
        return cls(task.name, tuple(graphs), features)

    @classmethod
    def for_language(cls, task: Task, language: str, arch: str = HOPPER) -> Program:
        """``from_task`` for what ``language`` runs on, on a GPU of ``arch``. Raises ``CodegenError`` for one without
        emitter.

        The last one is kept: whoever has time may ask for it ahead of those who need it.
        """
        if language not in LANGUAGES:
            raise CodegenError(f"kernels are generated in {', '.join(LANGUAGES)}, not in {language!r}")
        key = (task.id, task.name, language)
        with _ALONE:
            if key not in _LAST:
                made = cls.from_task(task, LANGUAGES[language][0], "cuda" if language == "cuda" else "triton")
                _LAST.clear()
                _LAST[key] = made
            return _LAST[key].on(arch)

    def on(self, arch: str) -> Program:
        """The program for a GPU of ``arch``: what only others have instructions for is not legal."""
        if all(graph.arch == arch for graph in self.graphs):
            return self
        return replace(self, graphs=tuple(replace(graph, arch=arch) for graph in self.graphs))

    def seeds(self) -> list[Schedule]:
        """First drafts that differ in kind, the best guess first.

        Everything fused with own contractions and attention, convolutions in CUDA C++ where that has a kernel for
        them; with searches that begin in shared memory; with thin products in the kernels of others; with channels
        innermost; with weights prepared; with caches told what is read once, and long rows in pieces; all in one
        language; without attention; with library contractions, with caches told beside them; each node on its own.
        """
        loops = [fusion.fused(g) for g in self.graphs]
        attended = [fusion.attended(g, p) for g, p in zip(self.graphs, loops)]
        whole = [fusion.contracted(g, p) for g, p in zip(self.graphs, attended)]
        drafts = [
            Schedule(tuple(whole)),
            Schedule(tuple(fusion.contracted(g, p) for g, p in zip(self.graphs, loops))),
            Schedule(tuple(loops)),
            Schedule(tuple(fusion.unfused(g) for g in self.graphs)),
        ]
        if self.language == "triton":
            drafts.insert(0, Schedule(tuple(map(fusion.on_tensor_cores, self.graphs, whole))))
            drafts[-1:-1] = streams.told(self.graphs, drafts[-2])  # with the library's contractions
            drafts[1:1] = streams.drafts(self.graphs, drafts[0])
        if self.device == "cuda":
            staged = tuple(map(fusion.in_shared_memory, self.graphs, drafts[0].plans))
            drafts.insert(1, replace(drafts[0], plans=staged))
        if (ready := preparation.prepared(self.graphs, drafts[0])) is not None:
            drafts.insert(1, ready)
        if self.language == "triton" and any(map(channels_last.useful, self.graphs)):
            turned = Schedule(tuple(map(channels_last.everywhere, self.graphs, whole)))
            if self.legal(turned):
                drafts.insert(1, preparation.prepared(self.graphs, turned) or turned)
        if self.language == "triton":
            drafts.insert(1, Schedule(tuple(map(fusion.beside, self.graphs, drafts[0].plans))))
        return list(dict.fromkeys(drafts))

    def legal(self, schedule: Schedule) -> bool:
        return len(schedule.plans) == len(self.graphs) and all(
            fusion.legal(g, p) for g, p in zip(self.graphs, schedule.plans)
        )

    @property
    def device(self) -> str:
        """What the program was lowered for."""
        return self.graphs[0].device

    @property
    def language(self) -> str:
        """What kernels are printed in where nothing else is asked for."""
        return self.graphs[0].language

    def emit(self, schedule: Schedule, language: str = "") -> str:
        """The kernel module as text. Raises ``CodegenError`` for a language without emitter."""
        language = language or self.language
        if language not in LANGUAGES:
            raise CodegenError(f"kernels are generated in {', '.join(LANGUAGES)}, not in {language!r}")
        device, emit = LANGUAGES[language]
        if device != self.device:
            raise CodegenError(f"{self.name} was lowered for {self.device}; {language} is for {device}")
        try:
            return emit(self.name, self.graphs, schedule)
        except Illegal as reason:
            raise CodegenError(f"{self.name}: the schedule does not fit the graph ({reason})") from reason
