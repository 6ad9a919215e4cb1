"""Blocks whose weights stay on the host: the next one's are fetched while this one computes."""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from sgm.errors import one_line

logger = logging.getLogger(__name__)

ALIGNMENT = 256  # bytes; what GPUs read fastest


def weight_bytes(block: nn.Module) -> int:
    """What the parameters and buffers of a block fill, each aligned."""
    return sum(_aligned(tensor.nbytes) for tensor in (*block.parameters(), *block.buffers()))


def choose_resident(sizes: Sequence[int], room: int) -> set[int]:
    """Which blocks stay on the device: the largest first, as long as there is room.

    In a U-Net these take longest to copy for what they compute, and set the size of the buffers.
    """
    staying = set()
    for i in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        if sizes[i] <= room:
            staying.add(i)
            room -= sizes[i]
    return staying


def device_bytes(sizes: Sequence[int], resident: int) -> int:
    """What :class:`Streamed` takes on the device for blocks of these sizes."""
    staying = choose_resident(sizes, resident)
    streamed = [size for i, size in enumerate(sizes) if i not in staying]
    return sum(sizes[i] for i in staying) + 2 * max(streamed, default=0)


class Streamed:
    """Run blocks on a device that does not hold all of them, in a ``with`` block, or several.

    Whoever calls the blocks sees no difference: hooks give a block its weights before its forward
    pass and put them back after it, also where it fails. Blocks are best called in their order,
    again from the first after the last; in any other order they compute the same and wait for
    their weights. Two buffers of the size of the largest streamed block take turns, so nothing is
    allocated on the way. Outside of its forward pass, a streamed block is on the host, with the
    values and layouts that it came with.

    On CUDA the copies of streamed blocks run on a stream of their own, from page-locked memory;
    elsewhere they are plain.

    Args:
        blocks: in the order of their calls. They share no weights.
        device: where they compute.
        resident: bytes for blocks that stay on the device.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], device: torch.device, resident: int = 0
    ) -> None:
        self._device = device
        self._staying = choose_resident([weight_bytes(block) for block in blocks], resident)
        # What is fetched in every step; the rest is copied once for a video.
        often = [device.type == "cuda" and i not in self._staying for i in range(len(blocks))]
        self._all = [_Packed(*each) for each in zip(blocks, often, strict=True)]
        self._streamed = [each for i, each in enumerate(self._all) if i not in self._staying]
        self._slots: list[_Slot] = []
        self._running: _Slot | None = None
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        """Take the device's memory, and bring there what stays."""
        try:
            for i in self._staying:
                packed = self._all[i]
                packed.place(packed.host.to(self._device, non_blocking=True, copy=True))
            size = max((len(packed.host) for packed in self._streamed), default=0)
            kind = _CudaSlot if self._device.type == "cuda" else _Slot
            self._slots = [kind(size, self._device) for _ in range(2)]
        except BaseException:
            self.__exit__()
            raise
        self._hooks = list(self._hook())
        return self

    def __exit__(self, *_: object) -> None:
        """Leave all blocks on the host, without hooks, and give the device's memory back."""
        for hook in self._hooks:
            hook.remove()
        for packed in self._all:
            packed.leave_device()
        self._hooks, self._slots = [], []

    def _hook(self) -> Iterator[Any]:
        for k, packed in enumerate(self._streamed):
            yield packed.block.register_forward_pre_hook(partial(self._enter, k))
            yield packed.block.register_forward_hook(partial(self._leave, k), always_call=True)

    def _enter(self, k: int, *_: Any) -> None:
        self._running = slot = self._fetch(k)
        slot.wait()
        self._streamed[k].place(slot.memory)
        self._fetch((k + 1) % len(self._streamed))

    def _leave(self, k: int, *_: Any) -> None:
        self._streamed[k].place(self._streamed[k].host)
        if self._running:
            self._running.release()
        self._running = None

    def _fetch(self, k: int) -> "_Slot":
        """The slot that has the weights of block k, or will have."""
        for slot in self._slots:
            if slot.holds == k:
                return slot
        slot = next(slot for slot in self._slots if slot is not self._running)
        slot.fill(k, self._streamed[k].host)
        return slot


def whole(modules: Sequence[nn.Module], device: torch.device) -> Streamed:
    """Modules that are all on the device for as long as the ``with`` block lasts."""
    return Streamed(modules, device, sum(map(weight_bytes, modules)))


class InTurn:
    """In a ``with`` block, have each of several modules on the device for its forward pass alone.

    Args:
        modules: that share no weights.
        device: where they compute.
    """

    def __init__(self, modules: Sequence[nn.Module], device: torch.device) -> None:
        self._each = [(module, whole([module], device)) for module in modules]
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        """Wait for forward passes."""
        for module, weights in self._each:
            before, after = partial(_without_result, weights.__enter__), weights.__exit__
            self._hooks += [
                module.register_forward_pre_hook(before),
                module.register_forward_hook(partial(_without_result, after), always_call=True),
            ]
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the modules without hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _without_result(act: Callable[[], object], *_: Any) -> None:
    """A hook that changes neither arguments nor results."""
    act()


class _Packed:
    """A block's parameters and buffers, one behind the other in one piece of memory."""

    def __init__(self, block: nn.Module, lock: bool) -> None:
        self.block = block
        self._tensors = [*block.parameters(), *block.buffers()]
        self._views: dict[int, list[Tensor]] = {}  # by address of the memory
        make = pinned if lock else torch.empty
        self.host = make((weight_bytes(block),), dtype=torch.uint8)
        for tensor, view in zip(self._tensors, self._lay_out(self.host), strict=True):
            view.copy_(tensor.data)
        self.place(self.host)

    def place(self, memory: Tensor) -> None:
        """Let the block use what is in ``memory``, laid out as in ``host``."""
        place = memory.data_ptr()
        if place not in self._views:
            self._views[place] = self._lay_out(memory)
        for tensor, view in zip(self._tensors, self._views[place], strict=True):
            tensor.data = view

    def leave_device(self) -> None:
        """Let the block use the host's memory, and keep hold of no other."""
        self._views.clear()
        self.place(self.host)

    def _lay_out(self, memory: Tensor) -> list[Tensor]:
        """Views of ``memory`` in the types, shapes and layouts of the tensors."""
        views, start = [], 0
        for tensor in self._tensors:
            flat = memory[start : start + tensor.nbytes].view(tensor.dtype)
            views.append(flat.as_strided(tensor.shape, torch.empty_like(tensor).stride()))
            start += _aligned(tensor.nbytes)
        return views


class _Slot:
    """A buffer on the device for the weights of one block after the other.

    Attributes:
        memory: the buffer, in bytes.
        holds: number of the block whose weights it has, or will have.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.holds: int | None = None

    def fill(self, k: int, host: Tensor) -> None:
        """Copy the weights of block k here, once the last user is done."""
        self.holds = k
        self.memory[: len(host)].copy_(host, non_blocking=True)

    def wait(self) -> None:
        """Compute nothing before the weights are here."""

    def release(self) -> None:
        """Nothing that was not called yet will read the weights."""


class _CudaSlot(_Slot):
    """A buffer that is filled while the device computes with the other."""

    def __init__(self, size: int, device: torch.device) -> None:
        super().__init__(size, device)
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._filled, self._free = torch.cuda.Event(), torch.cuda.Event()
        self.memory.record_stream(self._stream)
        self.release()  # whoever had this memory before may still be computing

    def fill(self, k: int, host: Tensor) -> None:
        self._stream.wait_event(self._free)
        with torch.cuda.stream(self._stream):
            super().fill(k, host)
        self._filled.record(self._stream)

    def wait(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._filled)

    def release(self) -> None:
        self._free.record(torch.cuda.current_stream(self._device))


def pinned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor in page-locked memory of the host, which CUDA copies from and to by itself.

    Where the host locks no more, the tensor is a plain one: copies then wait.
    """
    give_back_pinned()
    try:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)
    except RuntimeError as error:
        logger.warning("the host locks no more memory, copies take longer: %s", one_line(error))
        return torch.empty(tuple(shape), dtype=dtype)


def give_back_pinned() -> None:
    """Give page-locked memory that nobody uses back to the host: PyTorch would keep it for good."""
    empty_cache = getattr(torch._C, "_host_emptyCache", None)  # not in every PyTorch
    if empty_cache:
        empty_cache()


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
