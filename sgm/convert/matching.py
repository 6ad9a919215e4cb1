"""Tables and a checkpoint brought together: entries for what fits, one error for what does not."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from sgm.convert.conversion import Entry, Shapes
from sgm.convert.pairs import Form, Pair, Shape
from sgm.util import counted


class Matcher:
    """Finds the tensors of pairs in a checkpoint and notes what does not fit.

    Args:
        shapes: shapes of the checkpoint's tensors by name.
        layout: name of its layout, for errors.
        names: name in the checkpoint by key of the layout, where another than the key.
    """

    def __init__(self, shapes: Shapes, layout: str, names: Mapping[str, str] | None = None) -> None:
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.layout = layout
        self.names = names or {}
        self.used: set[str] = set()
        self.missing: list[str] = []
        self.misshapen: dict[str, str] = {}

    def to_native(self, pairs: Iterable[Pair]) -> list[Entry]:
        """Entries for the native side of ``pairs``."""
        located = {pair: tuple(self.names.get(key, key) for key in pair.foreign) for pair in pairs}
        return [
            Entry(pair.native, shape, located[pair], pair.form.pack)
            for pair, shape in self._fitting(located, lambda pair, *parts: pair.form.packed(*parts))
        ]

    def from_native(self, pairs: Iterable[Pair]) -> list[Entry]:
        """Entries for the other side of ``pairs``."""
        located = {pair: (pair.native,) for pair in pairs}
        return [
            Entry(key, part, located[pair], _part(pair.form, number))
            for pair, shape in self._fitting(located, lambda _, native: native)
            for number, (key, part) in enumerate(
                zip(pair.foreign, pair.form.unpacked(shape), strict=True)
            )
        ]

    def finish(self, droppable: Callable[[str], object]) -> tuple[str, ...]:
        """The tensors that no pair used, if all of them may be dropped and nothing else is wrong.

        Args:
            droppable: whether a tensor of this name may be left out.

        Raises:
            ValueError: names what is missing, left over or misshapen.
        """
        unused = [name for name in self.shapes if name not in self.used]
        faults = (
            counted(self.missing, "tensor", "missing"),
            counted((name for name in unused if not droppable(name)), "tensor", "left over"),
            counted(self.misshapen.values(), "tensor", "of another shape"),
        )
        if any(faults):
            raise ValueError(
                f"expected the weights of a video model in the {self.layout} layout, got "
                f"{'; '.join(fault for fault in faults if fault)}"
            )
        return tuple(unused)

    def _fitting(
        self,
        located: Mapping[Pair, Sequence[str]],
        native_shape: Callable[..., Shape | None],
    ) -> Iterator[tuple[Pair, Shape]]:
        """Pairs whose tensors are there and agree with the others, with their native shapes."""
        found = {
            pair: native_shape(pair, *(self.shapes[name] for name in names))
            for pair, names in located.items()
            if all(name in self.shapes for name in names)
        }
        sizes = _Sizes((pair, shape) for pair, shape in found.items() if shape is not None)
        for pair, names in located.items():
            if pair.projects and not sizes.differ(pair):
                continue
            self.used.update(names)
            shape, expected = found.get(pair), sizes.expected(pair)
            if pair not in found:
                self.missing += [name for name in names if name not in self.shapes]
            elif shape == expected:
                yield pair, shape
            else:
                got = " and ".join(f"{name} {list(self.shapes[name])}" for name in names)
                wanted = f"[{', '.join(map(str, expected))}]"
                place = "" if pair.native in names else f" for {pair.native}"
                self.misshapen.setdefault(got, f"{got}, expected {wanted}{place}")


class _Sizes:
    """What the letters in the shapes of pairs stand for: what most of the tensors say."""

    def __init__(self, shapes: Iterable[tuple[Pair, Shape]]) -> None:
        votes: dict[tuple[str, str], Counter[int]] = defaultdict(Counter)
        for pair, shape in shapes:
            for size, actual in zip(pair.shape.split(), shape, strict=False):
                if not size.isdecimal():
                    votes[_letter(pair, size)][actual // _factor(size)] += 1
        self.values = {letter: count.most_common(1)[0][0] for letter, count in votes.items()}

    def differ(self, pair: Pair) -> bool:
        """Whether channels in and out of the pair's block differ."""
        return self.values.get((pair.scope, "i")) != self.values.get((pair.scope, "o"))

    def expected(self, pair: Pair) -> tuple[int | str, ...]:
        """The shape that the pair's native tensor should have; unknown sizes stay letters."""
        return tuple(self._stands_for(pair, size) for size in pair.shape.split())

    def _stands_for(self, pair: Pair, size: str) -> int | str:
        if size.isdecimal():
            return int(size)
        value = self.values.get(_letter(pair, size))
        return size if value is None else _factor(size) * value


def _letter(pair: Pair, size: str) -> tuple[str, str]:
    """A letter and where it has its value: capital ones have it everywhere."""
    return "" if size[-1].isupper() else pair.scope, size[-1]


def _factor(size: str) -> int:
    return int(size[:-1] or 1)


def _part(form: Form, number: int) -> Callable[[Tensor], Tensor]:
    return lambda native: form.unpack(native)[number]
