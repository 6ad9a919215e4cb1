"""Exponential moving average of a model's trained parameters."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Averages parameters in float32: ``shadow <- d shadow + (1 - d) parameter`` after each step.

    The decay warms up, ``d = min(decay, (1 + n) / (10 + n))`` at update ``n``, so that a short run
    is not dominated by its initialisation.

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
        live = [p.detach().float() for p in self._live.values()]
        torch._foreach_lerp_(list(self._shadow.values()), live, 1.0 - decay)

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
        """Return the averages by parameter name, and the number of updates under ``"updates"``."""
        return {"updates": torch.tensor(self.updates), **self._shadow}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state_dict`` gave.

        Raises:
            ValueError: the names are not those of this model.
        """
        wrong = sorted((set(state) - {"updates"}) ^ set(self._shadow))
        if wrong:
            raise ValueError(f"the averages are of another model; names that differ: {wrong[:5]}")
        self.updates = int(state["updates"])
        for name, shadow in self._shadow.items():
            shadow.copy_(state[name])
