"""All embedders of a model, and their results by the place where they enter the U-Net.

Shapes: b clips, n rows (b, or b t for embedders that are given one value per frame).
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sgm.modules.draws import draw
from sgm.util import append_dims, instantiate_from_config

PLACE_BY_NDIM = {2: "vector", 3: "crossattn", 4: "concat"}
CHANNEL_DIM = {"vector": 1, "crossattn": 2, "concat": 1}

Batch = Mapping[str, Tensor]
Conditioning = dict[str, Tensor]


class GeneralConditioner(nn.Module):
    """Run every embedder on its entry of the batch and join the results.

    An embedding's number of dimensions says where it goes: 2 to ``vector`` (added to the noise
    level's embedding), 3 to ``crossattn`` (context tokens), 4 to ``concat`` (beside the latents).

    Args:
        emb_models: per embedder a mapping with ``target``, ``params``, ``input_key`` (its entry
            of the batch), ``is_trainable``, and ``ucg_rate``: the probability with which, in
            training mode, a row is set to zero, for classifier-free guidance (arXiv 2207.12598);
            an embedder with a rate is to be given one row per clip, or single frames drop out.
        ucg_rates: rates by input key, in place of those in ``emb_models``.

    Raises:
        ValueError: an embedder without ``input_key``, or a rate for a key that none has.
    """

    def __init__(
        self,
        emb_models: Iterable[Mapping[str, Any]],
        ucg_rates: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.embedders = nn.ModuleList()
        self.input_keys: list[str] = []
        self.ucg_rates: list[float] = []
        self.trainable: list[bool] = []
        for config in emb_models:
            if "input_key" not in config:
                raise ValueError(f"{config['target']}: expected an 'input_key' in emb_models")
            embedder = instantiate_from_config(config)
            self.input_keys.append(config["input_key"])
            self.ucg_rates.append(config.get("ucg_rate", 0.0))
            self.trainable.append(config.get("is_trainable", False))
            if not self.trainable[-1]:
                embedder.requires_grad_(False).eval()
            self.embedders.append(embedder)
        for key, rate in (ucg_rates or {}).items():
            if key not in self.input_keys:
                raise ValueError(f"ucg_rates: expected keys of {self.input_keys}, got {key!r}")
            self.ucg_rates[self.input_keys.index(key)] = rate

    def train(self, mode: bool = True) -> "GeneralConditioner":
        """Switch the mode; embedders that are not trainable stay in evaluation mode."""
        super().train(mode)
        for embedder, trainable in zip(self.embedders, self.trainable, strict=True):
            embedder.train(mode and trainable)
        return self

    def widths(self) -> dict[str, dict[str, int]] | None:
        """Channels that the embedders give, by place and input key.

        An embedder tells them by its attributes ``place`` and ``channels``, the latter of an entry
        of one number or picture for each row. None where one does not.
        """
        given: dict[str, dict[str, int]] = {place: {} for place in CHANNEL_DIM}
        for key, embedder in zip(self.input_keys, self.embedders, strict=True):
            place, channels = (getattr(embedder, name, None) for name in ("place", "channels"))
            if place is None or channels is None:
                return None
            given[place][key] = given[place].get(key, 0) + channels
        return given

    def require(self, batch: Batch, given: Batch) -> None:
        """Make sure that there is an entry, or a result, for each embedder.

        Raises:
            ValueError: names those that are missing.
        """
        missing = [key for key in self.input_keys if key not in batch and key not in given]
        if missing:
            raise ValueError(f"conditioning needs the batch entries {missing}, got {list(batch)}")

    def embed(self, batch: Batch, given: Batch | None = None) -> list[Tensor]:
        """Each embedder's result on its entry of the batch.

        Args:
            batch: entries by the embedders' input keys.
            given: results by input key that are there already: their embedders do not run.

        Raises:
            ValueError: an entry is missing.
        """
        given = given or {}
        self.require(batch, given)
        results = []
        for embedder, key, trainable in zip(
            self.embedders, self.input_keys, self.trainable, strict=True
        ):
            with torch.set_grad_enabled(trainable and torch.is_grad_enabled()):
                results.append(given[key] if key in given else embedder(batch[key]))
        return results

    def join(self, embeddings: list[Tensor], zero: Collection[str] = ()) -> Conditioning:
        """Join embeddings by place, those whose input key is in ``zero`` as zeros."""
        places: dict[str, list[Tensor]] = defaultdict(list)
        for key, embedding in zip(self.input_keys, embeddings, strict=True):
            places[PLACE_BY_NDIM[embedding.ndim]].append(
                torch.zeros_like(embedding) if key in zero else embedding
            )
        return {place: torch.cat(parts, CHANNEL_DIM[place]) for place, parts in places.items()}

    def drop(
        self, embeddings: list[Tensor], generator: torch.Generator | None = None
    ) -> list[Tensor]:
        """Set rows to zero with each embedder's ``ucg_rate``, independently of each other.

        Args:
            embeddings: as from :meth:`embed`.
            generator: source of the draws, on the CPU, so that they do not depend on the device.
        """
        return [
            x * append_dims(draw(torch.rand, (len(x),), generator) >= rate, x.ndim).to(x)
            if rate > 0
            else x
            for x, rate in zip(embeddings, self.ucg_rates, strict=True)
        ]

    def forward(
        self,
        batch: Batch,
        force_zero_embeddings: Collection[str] | None = None,
        generator: torch.Generator | None = None,
        given: Batch | None = None,
    ) -> Conditioning:
        """Condition on a batch; in training mode with dropout.

        Args:
            batch: entries by the embedders' input keys.
            force_zero_embeddings: input keys whose embeddings are set to zero.
            generator: source of the dropout's draws.
            given: embeddings that are there already, see :meth:`embed`.

        Returns:
            ``vector`` (n, e), ``crossattn`` (n, k, d) and ``concat`` (n, c, h, w), as present.
        """
        embeddings = self.embed(batch, given)
        if self.training:
            embeddings = self.drop(embeddings, generator)
        return self.join(embeddings, force_zero_embeddings or ())

    def get_unconditional_conditioning(
        self,
        batch_c: Batch,
        batch_uc: Batch | None = None,
        force_uc_zero_embeddings: Collection[str] | None = None,
        force_cond_zero_embeddings: Collection[str] | None = None,
    ) -> tuple[Conditioning, Conditioning]:
        """Conditioning with and without the picture, for guidance; no dropout.

        Args:
            batch_c: the batch.
            batch_uc: another batch for the unconditional half; where None, the embeddings of
                ``batch_c`` serve both halves and are computed once.
            force_uc_zero_embeddings: input keys that are zero in the unconditional half.
            force_cond_zero_embeddings: input keys that are zero in the conditional half.
        """
        c = self.embed(batch_c)
        uc = c if batch_uc is None else self.embed(batch_uc)
        return (
            self.join(c, force_cond_zero_embeddings or ()),
            self.join(uc, force_uc_zero_embeddings or ()),
        )
