"""The fresh judges of one confirmation on a GPU, started side by side and ended together."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait

from ke_gym.evaluation.gpu_client import GpuClient


class Spares:
    """``count`` judges, which ``open_one`` opens. The first may be used, untimed, while the others still open.

    One that cannot be opened is not there.
    """

    def __init__(self, open_one: Callable[[], GpuClient], count: int) -> None:
        self._used: list[GpuClient] = []
        pool = ThreadPoolExecutor(max(1, count), thread_name_prefix="open-judge")
        self._opening: list[Future[GpuClient]] = [pool.submit(open_one) for _ in range(count)]
        pool.shutdown(wait=False)

    def take(self) -> GpuClient | None:
        """The next that is ready, which nobody has used; None if there is none left."""
        for future in as_completed(self._opening):
            self._opening.remove(future)
            if future.exception() is None:
                self._used.append(future.result())
                return self._used[-1]
        return None

    def settle(self) -> None:
        """Wait until no process is being started."""
        wait(self._opening)

    def close(self) -> None:
        """End them all."""
        while self.take() is not None:
            pass
        if self._used:
            with ThreadPoolExecutor(len(self._used)) as pool:
                list(pool.map(GpuClient.close, self._used))
            self._used.clear()
