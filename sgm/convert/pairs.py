"""Tables of tensors that correspond: the notation in which a layout is written down.

A table lists modules or tensors by their names in the native and in the other layout, with the
shape that the native one gives them. A shape is written as numbers and letters, ``"o i 3 3"``: a
small letter is one number within a block, a capital letter one number throughout the model, ``4c``
is four times ``c``. The letters get their values from the tensors themselves: what most of them
say; one that contradicts it is misshapen.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Form:
    """How the values of a native tensor are written in the other layout.

    Attributes:
        pack: tensors of the other layout -> the native tensor.
        unpack: the native tensor -> tensors of the other layout.
        packed: their shapes -> its shape; None where they do not go together.
        unpacked: its shape -> their shapes.
    """

    pack: Callable[..., Tensor]
    unpack: Callable[[Tensor], Sequence[Tensor]]
    packed: Callable[..., Shape | None]
    unpacked: Callable[[Shape], Sequence[Shape]]


def _stacked(*shapes: Shape) -> Shape | None:
    (first, *rest) = shapes[0]
    return (len(shapes) * first, *rest) if len(set(shapes)) == 1 else None


SAME = Form(lambda x: x, lambda x: (x,), lambda shape: shape, lambda shape: (shape,))
# A 1x1 convolution written as a linear layer.
LINEAR = Form(
    lambda x: x[..., None, None],
    lambda x: (x[..., 0, 0],),
    lambda shape: (*shape, 1, 1),
    lambda shape: (shape[:-2],),
)
TRANSPOSED = Form(
    lambda x: x.T.contiguous(),
    lambda x: (x.T.contiguous(),),
    lambda shape: shape[::-1],
    lambda shape: (shape[::-1],),
)
# Three tensors one above the other: the projections to query, key and value.
STACKED = Form(
    lambda *parts: torch.cat(parts),
    lambda x: x.chunk(3),
    _stacked,
    lambda shape: ((shape[0] // 3, *shape[1:]),) * 3,
)


@dataclass(frozen=True, eq=False)
class Pair:
    """A native tensor and the tensors that hold its values in another layout.

    Attributes:
        native: native key.
        foreign: keys of the other layout, in the order in which ``form`` takes and gives them.
        shape: shape of the native tensor, in letters.
        form: how its values are written in the other layout.
        scope: where small letters keep their value.
        projects: a shortcut, there only where ``i`` and ``o`` differ.
    """

    native: str
    foreign: tuple[str, ...]
    shape: str
    form: Form = SAME
    scope: str = ""
    projects: bool = False

    def prefixed(self, native: str, foreign: str) -> "Pair":
        """The same pair with a prefix on either side."""
        return replace(
            self,
            native=native + self.native,
            foreign=tuple(foreign + key for key in self.foreign),
            scope=self.scope and native + self.scope,  # a block's, if it has one
        )


Table = tuple[Pair, ...]


def tensor(native: str, foreign: str, shape: str, form: Form = SAME) -> Table:
    """One tensor."""
    return (Pair(native, (foreign,), shape, form),)


def module(
    native: str, foreign: str, shape: str, form: Form = SAME, projects: bool = False
) -> Table:
    """Weight, of the given shape, and bias of a layer."""
    return (
        Pair(f"{native}.weight", (f"{foreign}.weight",), shape, form, projects=projects),
        Pair(f"{native}.bias", (f"{foreign}.bias",), shape.split()[0], projects=projects),
    )


# The convolution between two levels.
STEP: Table = (Pair("weight", ("weight",), "c c 3 3"), Pair("bias", ("bias",), "c"))


def prefixed(native: str, foreign: str, pairs: Iterable[Pair]) -> Iterator[Pair]:
    """``pairs`` with a prefix on either side."""
    return (pair.prefixed(native, foreign) for pair in pairs)


def block(native: str, foreign: str, pairs: Iterable[Pair]) -> Iterator[Pair]:
    """``pairs`` with a prefix on either side; those outside smaller blocks share small letters."""
    for pair in prefixed(native, foreign, pairs):
        yield replace(pair, scope=pair.scope or native)


def count(keys: Iterable[str], prefix: str) -> int:
    """How many numbers follow ``prefix`` in ``keys``: one more than the largest; 0 for none."""
    numbers = {key.removeprefix(prefix).partition(".")[0] for key in keys if key.startswith(prefix)}
    return max((int(number) + 1 for number in numbers if number.isdecimal()), default=0)
