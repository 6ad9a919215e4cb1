"""Which models a page offers, and how to get those whose weights are not here."""

from collections.abc import Iterable
from dataclasses import dataclass

from sgm.checkpoint.room import in_bytes
from sgm.inference.specs import SPECS, ModelSpec

HALF = 2  # bytes of a weight in float16, the smaller of the two types that files are published in


@dataclass(frozen=True)
class Offer:
    """One model of the list.

    Attributes:
        spec: its row in the table of models.
        present: its weights are here.
        size: of its weights in float16, in words, such as ``4.78 GB``.
        licence: in words.
        command: what fetches it; empty for what comes with this project.
    """

    spec: ModelSpec
    present: bool
    size: str
    licence: str
    command: str


def list_offers(names: Iterable[str] | None = None) -> list[Offer]:
    """The models, those whose weights are here first; else in the order of the table.

    Args:
        names: which; None for all.
    """
    chosen = SPECS if names is None else set(names)
    offers = [_offer(spec) for name, spec in SPECS.items() if name in chosen]
    return sorted(offers, key=lambda offer: not offer.present)


def default_offer(offers: Iterable[Offer]) -> Offer | None:
    """The bundled model if it is here, as it is quick everywhere; else the first that is."""
    present = [offer for offer in offers if offer.present]
    bundled = (offer for offer in present if offer.spec.repository is None)
    return next(bundled, next(iter(present), None))


def _offer(spec: ModelSpec) -> Offer:
    command = f"python scripts/download.py {spec.name}" if spec.repository else ""
    size = in_bytes(HALF * spec.parameters)
    return Offer(spec, spec.checkpoint is not None, size, spec.licence, command)
