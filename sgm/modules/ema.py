"""Exponential moving average of a model's trained parameters."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


class Ema:
    """Averages parameters in float32: ``shadow <- d shadow + (1 - d) parameter`` after each step.

    The decay warms up, ``d = min(decay, (1 + n) / (10 + n))`` at update ``n``, so that a short run
    is not dominated by its initialisation. Averages of parameters that are shared out over
    processes (`DTensor`) are shared out alike.

    Args:
        parameters: (name, parameter) pairs; those that need no gradient are left out.
        decay: the final ``d``, in [0, 1).
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"expected an EMA decay in [0, 1), got {decay}")
        self.decay = decay
        self.updates = 0
        self._live = {name: p for name, p in parameters if p.requires_grad}
        self._shadow = {name: p.detach().float().clone() for name, p in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take one step towards the present parameters."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        live = [local(p.detach()).float() for p in self._live.values()]
        torch._foreach_lerp_([local(x) for x in self._shadow.values()], live, 1.0 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averages in the place of the parameters for the length of a ``with`` block."""
        kept = {name: p.detach().clone() for name, p in self._live.items()}
        self.copy_to_model()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in self._live.items():
                    p.copy_(kept[name])

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Overwrite the parameters with their averages."""
        for name, p in self._live.items():
            p.copy_(self._shadow[name])

    def to(self, device: torch.device) -> "Ema":
        """Move the averages to the device of the parameters."""
        self._shadow = {name: shadow.to(device) for name, shadow in self._shadow.items()}
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by parameter name, and the number of updates under ``"updates"``.

        Averages that are shared out are `gathered`: all processes must call this.
        """
        whole = {name: gathered(shadow) for name, shadow in self._shadow.items()}
        return {"updates": torch.tensor(self.updates), **whole}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state_dict`` gave, whether it was shared out there or is here.

        Raises:
            ValueError: the names are not those of this model.
        """
        wrong = sorted((set(state) - {"updates"}) ^ set(self._shadow))
        if wrong:
            raise ValueError(f"the averages are of another model; names that differ: {wrong[:5]}")
        self.updates = int(state["updates"])
        for name, shadow in self._shadow.items():
            shadow.copy_(shared_like(shadow, state[name]))


def local(x: Tensor) -> Tensor:
    """Return what this process holds of a tensor: the same memory."""
    return x.to_local() if isinstance(x, DTensor) else x


def gathered(x: Tensor) -> Tensor:
    """Put a tensor together that is shared out, on the CPU of the first process; others stay.

    All processes must call this, and those after the first get their share back.
    """
    if not isinstance(x, DTensor):
        return x
    whole = x.full_tensor()
    return whole.cpu() if x.device_mesh.get_rank() == 0 else x


def shared_like(like: Tensor, whole: Tensor) -> Tensor:
    """Share out a tensor that every process has, as ``like`` is."""
    if not isinstance(like, DTensor):
        return whole
    mesh, placements = like.device_mesh, like.placements
    device = like.to_local().device
    return distribute_tensor(whole.to(device), mesh, placements, src_data_rank=None)
