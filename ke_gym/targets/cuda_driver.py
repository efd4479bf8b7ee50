"""The few functions of NVIDIA's driver and of its management library that are needed, through ctypes.

Kernels come as cubins made elsewhere, so neither a toolkit nor a runtime library is: ``libcuda`` and
``libnvidia-ml`` come with the driver. Everything works in the context that is current in the calling thread,
which is torch's. Only trusted worker processes load this: the parent and the zygote never touch CUDA.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_uint, c_uint32, c_uint64, c_void_p
from typing import Any

import torch

from ke_gym.languages.plan import Geometry

runtime: Any = torch.cuda
"""What is typed in some versions of torch and not in others: events, properties, the spinning kernel."""

MAX_DYNAMIC_SHARED, NON_PORTABLE_CLUSTER = 8, 14  # CUfunction_attribute
_STATIC_SHARED, _LOCAL_BYTES, _REGISTERS = 1, 3, 4
_COOPERATIVE, _CLUSTER, _PROGRAMMATIC = 2, 4, 6  # CUlaunchAttributeID
_PAGEABLE_ACCESS = 88  # CUdevice_attribute
_PORTABLE_CLUSTER_BLOCKS = 8
_NON_BLOCKING, _THREAD_LOCAL = 1, 1  # CUstream_flags, CUstreamCaptureMode
_UPDATE_FAILURE = 910  # CUresult
_LAZY_PEER_ACCESS = 1  # CUipcMem_flags
# CUtensorMapDataType
TENSOR_MAP_TYPES = {
    "uint8": 0, "int8": 0, "bool": 0, "int16": 1, "int32": 3, "int64": 5, "float16": 6, "float32": 7,
    "float64": 8, "bfloat16": 9,
}  # fmt: skip
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
TENSOR_MAP_BYTES = 128
MEMORY_HANDLE_BYTES = 64
ALLOCATION_UNIT = 2 << 20
OUT_OF_MEMORY = 2  # CUresult
# After these the context is lost, and with it the process (CUDA Driver API, CUresult).
_STICKY = {214, 220, 700, 702, 709, 710, 712, 713, 714, 715, 716, 717, 718, 719}


class CudaError(Exception):
    """A driver call failed; ``code`` is its CUresult."""

    def __init__(self, call: str, code: int, name: str) -> None:
        super().__init__(f"{call}: {name}")
        self.code = code

    @property
    def not_of_the_plan(self) -> bool:
        """Whether it says something of the device, whose memory or context is gone, rather than of what was to be run."""
        return self.code in _STICKY or self.code == OUT_OF_MEMORY


class _Attribute(ctypes.Structure):
    _fields_ = [("id", c_int), ("pad", c_int), ("value", c_uint * 16)]


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid", c_uint * 3), ("block", c_uint * 3), ("shared", c_uint), ("stream", c_void_p),
        ("attributes", POINTER(_Attribute)), ("count", c_uint),
    ]  # fmt: skip


class _MemoryHandle(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_ubyte * MEMORY_HANDLE_BYTES)]


class Driver:
    """``libcuda``. Raises ``CudaError`` for every call that fails, ``OSError`` where there is no driver."""

    def __init__(self) -> None:
        self._lib = ctypes.CDLL("libcuda.so.1")

    def load(self, binary: bytes) -> int:
        """A module of this context from a cubin; code and ``__device__`` variables are as new."""
        module = c_void_p()
        self._call("cuModuleLoadData", byref(module), c_char_p(binary))
        return module.value or 0

    def unload(self, module: int) -> None:
        self._call("cuModuleUnload", c_void_p(module))

    def function(self, module: int, name: str) -> int:
        handle = c_void_p()
        self._call("cuModuleGetFunction", byref(handle), c_void_p(module), name.encode())
        return handle.value or 0

    def prepare(self, function: int, geometry: Geometry) -> None:
        """What a kernel must be told once before it is launched so."""
        if geometry.shared > 48 << 10:
            self._set(function, MAX_DYNAMIC_SHARED, geometry.shared)
        x, y, z = geometry.cluster
        if x * y * z > _PORTABLE_CLUSTER_BLOCKS:
            self._set(function, NON_PORTABLE_CLUSTER, 1)

    def config(self, geometry: Geometry) -> Any:
        """The launch configuration for ``launch``."""
        attributes = []
        if geometry.cluster != (1, 1, 1):
            attributes.append(_Attribute(_CLUSTER, 0, (c_uint * 16)(*geometry.cluster)))
        if geometry.cooperative:
            attributes.append(_Attribute(_COOPERATIVE, 0, (c_uint * 16)(1)))
        if geometry.programmatic:
            attributes.append(_Attribute(_PROGRAMMATIC, 0, (c_uint * 16)(1)))
        array = (_Attribute * max(1, len(attributes)))(*attributes)
        return _Config(
            (c_uint * 3)(*geometry.grid), (c_uint * 3)(*geometry.block), geometry.shared, None, array,
            len(attributes),
        )  # fmt: skip

    def launch(self, function: int, config: Any, stream: int, parameters: Any) -> None:
        """Enqueue a kernel; ``parameters`` is an array of pointers to its arguments."""
        config.stream = stream
        code = self._lib.cuLaunchKernelEx(byref(config), c_void_p(function), parameters, None)
        if code:
            raise self._error("cuLaunchKernelEx", code)

    def side_stream(self) -> int:
        """A stream apart from torch's, on which launches can be recorded instead of run."""
        stream = c_void_p()
        self._call("cuStreamCreate", byref(stream), c_uint(_NON_BLOCKING))
        return stream.value or 0

    def drop_stream(self, stream: int) -> None:
        self._call("cuStreamDestroy_v2", c_void_p(stream))

    def record(self, stream: int, enqueue: Callable[[], object]) -> int:
        """The graph of what ``enqueue`` puts on a side stream."""
        graph = c_void_p()
        self._call("cuStreamBeginCapture_v2", c_void_p(stream), c_int(_THREAD_LOCAL))
        try:
            enqueue()
        finally:
            code = self._lib.cuStreamEndCapture(c_void_p(stream), byref(graph))
        if code:
            raise self._error("cuStreamEndCapture", code)
        return graph.value or 0

    def drop_graph(self, graph: int) -> None:
        self._call("cuGraphDestroy", c_void_p(graph))

    def instantiate(self, graph: int) -> int:
        """An executable copy of a graph."""
        executable = c_void_p()
        self._call("cuGraphInstantiateWithFlags", byref(executable), c_void_p(graph), c_uint64(0))
        return executable.value or 0

    def update(self, executable: int, graph: int) -> bool:
        """Give an executable graph the arguments of another of its shape; False where the shapes differ."""
        found = (c_uint64 * 4)()  # CUgraphExecUpdateResultInfo: what did not match, and where
        code = self._lib.cuGraphExecUpdate_v2(c_void_p(executable), c_void_p(graph), found)
        if code and code != _UPDATE_FAILURE:
            raise self._error("cuGraphExecUpdate", code)
        return not code

    def launch_graph(self, executable: int, stream: int) -> None:
        """Enqueue an executable graph."""
        self._call("cuGraphLaunch", c_void_p(executable), c_void_p(stream))

    def drop_executable(self, executable: int) -> None:
        self._call("cuGraphExecDestroy", c_void_p(executable))

    def tensor_map(
        self,
        where: int,
        address: int,
        dtype: str,
        shape: Sequence[int],
        stride: Sequence[int],
        itemsize: int,
        box: Sequence[int],
        swizzle: int,
        nan_fill: bool,
    ) -> None:
        """Write the ``CUtensorMap`` of a tensor to host address ``where`` (64-byte aligned).

        ``shape``, ``stride`` (elements) and ``box`` are outermost first, as in torch.
        """
        rank = len(shape)
        self._call(
            "cuTensorMapEncodeTiled",
            c_void_p(where),
            c_int(TENSOR_MAP_TYPES[dtype]),
            c_uint32(rank),
            c_void_p(address),
            (c_uint64 * rank)(*reversed(shape)),
            (c_uint64 * max(1, rank - 1))(*(s * itemsize for s in reversed(stride[:-1]))),
            (c_uint32 * rank)(*reversed(box)),
            (c_uint32 * rank)(*[1] * rank),
            c_int(0),  # no interleave
            c_int(_SWIZZLES[swizzle]),
            c_int(2),  # 128-byte promotion in L2
            c_int(1 if nan_fill else 0),
        )

    def resources(self, function: int) -> dict[str, int]:
        """``registers`` per thread, ``local`` (spilled) bytes per thread, ``shared`` static bytes per block."""
        names = {"registers": _REGISTERS, "local": _LOCAL_BYTES, "shared": _STATIC_SHARED}
        found = {}
        for name, attribute in names.items():
            value = c_int()
            self._call("cuFuncGetAttribute", byref(value), c_int(attribute), c_void_p(function))
            found[name] = value.value
        return found

    def blocks_per_processor(self, function: int, threads: int, shared: int) -> int:
        """How many blocks of a kernel one multiprocessor holds at once."""
        count = c_int()
        self._call(
            "cuOccupancyMaxActiveBlocksPerMultiprocessor",
            byref(count),
            c_void_p(function),
            c_int(threads),
            ctypes.c_size_t(shared),
        )
        return count.value

    def reads_host_memory(self, device: int) -> bool:
        """Whether kernels can reach ordinary memory of this process (pageableMemoryAccess: HMM or ATS)."""
        value = c_int()
        self._call("cuDeviceGetAttribute", byref(value), c_int(_PAGEABLE_ACCESS), c_int(device))
        return bool(value.value)

    def allocate(self, size: int) -> int:
        """The address of at least ``size`` bytes of device memory that share their allocation with nothing else: who opens a
        part of an allocation has all of it (CUDA Driver API, ``cuIpcGetMemHandle``)."""
        address = c_uint64()
        whole = max(1, -(-size // ALLOCATION_UNIT)) * ALLOCATION_UNIT
        self._call("cuMemAlloc_v2", byref(address), ctypes.c_size_t(whole))
        return address.value

    def release(self, address: int) -> None:
        """Give back what ``allocate`` gave."""
        self._call("cuMemFree_v2", c_uint64(address))

    def extent(self, address: int) -> tuple[int, int]:
        """Where the allocation around a device address begins, and its size."""
        begin, size = c_uint64(), ctypes.c_size_t()
        self._call("cuMemGetAddressRange_v2", byref(begin), byref(size), c_uint64(address))
        return begin.value, size.value

    def share(self, address: int) -> tuple[bytes, int]:
        """What another process opens the allocation around a device address by, and where in it the address lies."""
        handle = _MemoryHandle()
        begin, _ = self.extent(address)
        self._call("cuIpcGetMemHandle", byref(handle), c_uint64(address))
        return bytes(handle.bytes), address - begin

    def open_shared(self, handle: bytes) -> int:
        """Where another process's allocation begins in this one."""
        begin = c_uint64()
        given = _MemoryHandle.from_buffer_copy(handle)
        self._call("cuIpcOpenMemHandle_v2", byref(begin), given, c_uint(_LAZY_PEER_ACCESS))
        return begin.value

    def close_shared(self, begin: int) -> None:
        self._call("cuIpcCloseMemHandle", c_uint64(begin))

    def version(self) -> int:
        """The newest CUDA that the driver knows: 13000 for 13.0."""
        value = c_int()
        self._call("cuDriverGetVersion", byref(value))
        return value.value

    def forget_persisting_lines(self) -> None:
        """Give back what kernels asked to be kept in L2."""
        self._call("cuCtxResetPersistingL2Cache")

    def least_work(self, address: int) -> Callable[[], object]:
        """What enqueues as little as there is to do on the device, at the least cost: a zero is put at ``address``."""
        arguments = c_uint64(address), c_uint(0), ctypes.c_size_t(1), c_void_p(None)
        return functools.partial(self._lib.cuMemsetD32Async, *arguments)

    def _set(self, function: int, attribute: int, value: int) -> None:
        self._call("cuFuncSetAttribute", c_void_p(function), c_int(attribute), c_int(value))

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._lib, name)(*arguments)
        if code:
            raise self._error(name, code)

    def _error(self, call: str, code: int) -> CudaError:
        text = c_char_p()
        self._lib.cuGetErrorName(c_int(code), byref(text))
        return CudaError(call, code, (text.value or b"unknown error").decode())


class _Memory:
    """Device memory by its address, as the CUDA array interface describes it."""

    def __init__(self, begin: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (begin, False), "version": 3,
        }  # fmt: skip


def at_address(begin: int, size: int, device: torch.device) -> torch.Tensor:
    """The ``size`` bytes at an address, as uint8; they stay whose they are."""
    if device.type == "cpu":
        raw = (ctypes.c_uint8 * size).from_address(begin)
        return torch.frombuffer(raw, dtype=torch.uint8)
    return torch.as_tensor(_Memory(begin, size), device=device)


class Clocks:
    """The clock of one GPU's multiprocessors, read through NVML; nothing is ever set.

    ``mhz()`` is 0 where NVML is missing or does not say.
    """

    _SM = 1

    def __init__(self, uuid: str) -> None:
        self._device = c_void_p()
        try:
            self._lib: Any = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            self._lib = None
            return
        named = (uuid if uuid.startswith("GPU-") else f"GPU-{uuid}").encode()
        if self._lib.nvmlInit_v2() or self._lib.nvmlDeviceGetHandleByUUID(named, byref(self._device)):
            self._lib = None

    def mhz(self) -> int:
        """What the clock is now."""
        return self._read("nvmlDeviceGetClockInfo")

    def most_mhz(self) -> int:
        """What it can be at the most."""
        return self._read("nvmlDeviceGetMaxClockInfo")

    def _read(self, name: str) -> int:
        if self._lib is None:
            return 0
        value = c_uint()
        with contextlib.suppress(AttributeError):
            if getattr(self._lib, name)(self._device, c_int(self._SM), byref(value)) == 0:
                return value.value
        return 0
