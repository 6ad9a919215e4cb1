"""How much memory a computation takes at its peak, found without computing anything.

On the meta device tensors have sizes and no values. Here they are followed: memory counts from the
operation that makes it until its last tensor is gone, as with an allocator that wastes nothing.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_CONVOLUTION = torch.ops.aten.convolution.default
_GROUP_NORM = torch.ops.aten.native_group_norm.default
_SOFTMAX = torch.ops.aten._safe_softmax.default


def peak_bytes(run: Callable[[], object], gradients: bool = False) -> int:
    """The most memory that a computation makes and has not freed, in bytes.

    What is there before, such as weights and inputs, does not count. Three seconds more when first
    called with meta tensors, which then import a part of PyTorch's compiler.

    Args:
        run: computes on the meta device, without inference mode, which hides operations.
        gradients: record what a backward pass needs; ``run`` may do that pass.
    """
    with torch.set_grad_enabled(gradients), _FusedAttention(), _Followed() as memory:
        run()
    return memory.peak


class _Followed(TorchDispatchMode):
    """Follow the memory of all tensors that are made while the mode is on."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is _CONVOLUTION and _is_channels_last(args[0]):
            # As devices give it; the meta device does so for none.
            result = torch.empty_like(result, memory_format=torch.channels_last)
        given = set(_storages((args, kwargs)))
        for key, storage in _storages(result).items():
            if key not in given | self._known:
                self._known.add(key)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._forget, key, storage.nbytes())
        self.peak = max(self.peak, self.live + _inside(func, args, result))
        return result

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class _Attention(torch.autograd.Function):
    """What fused attention makes, and keeps for its gradient."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


class _FusedAttention(TorchFunctionMode):
    """Attention as fused kernels do it, where a device has one: without a matrix of weights.

    They want each token's channels side by side; for others PyTorch takes its slow path, and so
    does the meta device for all.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.scaled_dot_product_attention and all(x.stride(-1) == 1 for x in args[:3]):
            return _Attention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


def _storages(tree: Any) -> dict[int, torch.UntypedStorage]:
    """The memory of all tensors in nested arguments or results."""
    storages = (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return {storage._cdata: storage for storage in storages}


def _inside(func: Any, args: tuple[Any, ...], result: Any) -> int:
    """What an operation takes for itself while it runs: other layouts, and a mask of bytes."""
    if func == _SOFTMAX:
        return args[0].numel()
    if func not in (_GROUP_NORM, _CONVOLUTION):
        return 0
    x = args[0]
    inside = 0 if _is_dense(x) else x.nbytes
    if func == _CONVOLUTION and max(args[1].shape[2:]) > 1 and not _is_channels_last(x):
        inside += max(x.nbytes, result.nbytes)
    return inside


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or _is_channels_last(x)


def _is_channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
