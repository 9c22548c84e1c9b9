"""pycuda without a GPU: memory in RAM, and streams that do nothing until they are waited for.

It holds its users to CUDA's rules: only the thread whose context is current may call, only pinned
memory is copied asynchronously, nothing is used after it was freed, and everything else is freed
before its context. What breaks one is raised, and kept in ``PROBLEMS``. Fresh memory holds rubbish.
"""

from __future__ import annotations

import importlib.machinery
import sys
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

PROBLEMS: list[str] = []
MEMORY: dict[int, NDArray[np.uint8]] = {}
"""What is allocated on the device, by address."""
STREAMS: dict[int, Stream] = {}
PINNED: dict[int, int] = {}
"""Address and size of what is allocated on the host."""
RUBBISH = 0xA5
GPU_NAME = "Dry GPU (8 GB)"

_owner: list[int] = []
"""The thread whose context is current."""


class Error(Exception):
    pass


class MemoryError(Error):
    pass


def problem(text: str) -> Error:
    PROBLEMS.append(text)
    return Error(text)


def called(what: str) -> None:
    """Every call goes through here."""
    if _owner != [threading.get_ident()]:
        raise problem(f"{what}: no context is current in {threading.current_thread().name}")


class Context:
    def push(self) -> None:
        _owner.append(threading.get_ident())

    def pop(self) -> None:
        called("pop")
        _owner.clear()

    def detach(self) -> None:
        left = {"streams": len(STREAMS), "device": len(MEMORY), "pinned": len(PINNED)}
        if any(left.values()):
            raise problem(f"freed after their context: {left}")


class Device:
    def __init__(self, number: int) -> None:
        assert number == 0

    def name(self) -> str:
        return GPU_NAME

    def retain_primary_context(self) -> Context:
        return Context()


class Stream:
    def __init__(self) -> None:
        called("Stream")
        self.handle = 7 + len(STREAMS)
        STREAMS[self.handle] = weakref.proxy(self)
        self.waiting: list[Callable[[], None]] = []

    def synchronize(self) -> None:
        called("synchronize")
        for work in self.waiting:
            work()
        self.waiting.clear()

    def __del__(self) -> None:
        del STREAMS[self.handle]
        if self.waiting:
            problem("a stream is freed before its work is done")


class DeviceAllocation:
    most = 1 << 40
    """Bytes that there are."""

    address = 0

    def __init__(self, size: int) -> None:
        called("mem_alloc")
        if sum(memory.nbytes for memory in MEMORY.values()) + size > DeviceAllocation.most:
            raise MemoryError("cuMemAlloc failed: out of memory")
        self.address = 4096 * (1 + max(MEMORY, default=0))
        MEMORY[self.address] = np.full(size, RUBBISH, np.uint8)

    def __int__(self) -> int:
        return self.address

    def free(self) -> None:
        called("free")
        if MEMORY.pop(self.address, None) is None:
            raise problem("device memory is freed twice")

    def __del__(self) -> None:
        if self.address in MEMORY:
            problem("device memory is left to the garbage collector")


class PagelockedHostAllocation:
    def __init__(self, size: int) -> None:
        self._memory = np.full(size, RUBBISH, np.uint8)
        self.address = self._memory.__array_interface__["data"][0]
        PINNED[self.address] = size
        self.__array_interface__ = self._memory.__array_interface__

    def __del__(self) -> None:
        del PINNED[self.address]
        called("freeing pinned memory")


def pagelocked_empty(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    called("pagelocked_empty")
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.asarray(PagelockedHostAllocation(size)).view(dtype).reshape(shape)


def memory_at(address: int, size: int) -> NDArray[np.uint8]:
    if address not in MEMORY:
        raise problem(f"no device memory begins at {address}")
    if len(MEMORY[address]) < size:
        raise problem(f"{size} bytes reach beyond {len(MEMORY[address])} of device memory")
    return MEMORY[address][:size]


def _pinned(array: NDArray[Any]) -> NDArray[np.uint8]:
    """Its bytes, without a copy."""
    begin = array.__array_interface__["data"][0]
    if not array.flags.c_contiguous:
        raise problem("what is copied is not contiguous")
    if not any(a <= begin and begin + array.nbytes <= a + n for a, n in PINNED.items()):
        raise problem("what is copied asynchronously is not pinned")
    return array.reshape(-1).view(np.uint8)


def memcpy_htod_async(to: DeviceAllocation, source: NDArray[Any], stream: Stream) -> None:
    called("memcpy_htod_async")
    content, address = _pinned(source), int(to)

    def copy() -> None:
        memory_at(address, len(content))[:] = content

    stream.waiting.append(copy)


def memcpy_dtoh_async(to: NDArray[Any], source: DeviceAllocation, stream: Stream) -> None:
    called("memcpy_dtoh_async")
    content, address = _pinned(to), int(source)

    def copy() -> None:
        content[:] = memory_at(address, len(content))

    stream.waiting.append(copy)


def make_driver() -> types.ModuleType:
    """What stands for ``pycuda.driver``."""
    driver = types.ModuleType("pycuda.driver")
    for found in (Error, MemoryError, Context, Device, Stream, DeviceAllocation):
        setattr(driver, found.__name__, found)
    for function in (pagelocked_empty, memcpy_htod_async, memcpy_dtoh_async):
        setattr(driver, function.__name__, function)
    driver.init = lambda: None  # type: ignore[attr-defined]
    driver.mem_alloc = DeviceAllocation  # type: ignore[attr-defined]
    return driver


def install() -> None:
    """Put it where ``import pycuda.driver`` finds it."""
    driver = make_driver()
    package = types.ModuleType("pycuda")
    package.driver = driver  # type: ignore[attr-defined]
    for name, module in {"pycuda": package, "pycuda.driver": driver}.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules[name] = module
