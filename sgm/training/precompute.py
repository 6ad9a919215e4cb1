"""What training takes from the frozen encoders, computed once for each clip.

Shapes: t frames, h height, w width, z latent channels, f the downsampling factor, d width of CLIP's
embedding, k draws.
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from sgm.data.clips import read_clip
from sgm.data.index import LATENTS, VIDEO, Entry, Place
from sgm.inference.settings import find_model
from sgm.training.assemble import digest
from sgm.training.batch import NOISY, PICTURE, condition_batch
from sgm.training.latents import latent_modes

AT_ONCE = 2
"""Frames that are encoded together."""


class Encoders:
    """The autoencoders' and CLIP's encoders of a checkpoint, in float32; nothing else is loaded.

    Args:
        checkpoint: weights, as ``--ckpt_path`` of sampling takes them.
        device: where to encode.
        config: the model's YAML; None where the weights tell.
        draws: k, of noise on the condition frame.
        seed: of that noise.

    Raises:
        ValueError: no such file, or the model has no encoder.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        device: torch.device,
        config: str | Path | None = None,
        draws: int = 4,
        seed: int = 0,
    ) -> None:
        files = find_model(None, config, checkpoint)
        self.engine = files.load()
        conditioner = self.engine.conditioner
        missing = {PICTURE, NOISY}.difference(conditioner.input_keys)
        if missing or next(self.engine.first_stage_model.encoder.parameters(), None) is None:
            raise ValueError(f"{files.spec.name} has no encoders to make latents by")
        self.engine.eval()
        self.clip, self.condition = (
            conditioner.embedders[conditioner.input_keys.index(key)].float().to(device)
            for key in (PICTURE, NOISY)
        )
        self.first_stage = self.engine.first_stage_model.encoder.float().to(device)
        self.device, self.draws, self.seed = device, draws, seed

    def facts(self) -> dict[str, object]:
        """Tell what the results depend on."""
        encoder = digest(self.first_stage.state_dict(), self.engine.scale_factor)
        return {"encoder": encoder, "draws": self.draws, "seed": self.seed}

    @torch.no_grad()
    def encode(self, frames: Tensor, key: str) -> dict[str, Tensor]:
        """Encode a clip.

        Args:
            frames: (t, 3, h, w) in [-1, 1].
            key: its name, of which, with the seed, all draws are functions.

        Returns:
            ``latents`` (t, z, h / f, w / f), scaled, and ``cond_latents`` (k, z, h / f, w / f), not
            scaled, in half precision; ``cond_aug`` (k,) and ``image_embedding`` (d,) in float32.
        """
        frames = frames.to(self.device)
        word = hashlib.sha256(f"{self.seed} {key}".encode()).digest()[:7]
        generator = torch.Generator().manual_seed(int.from_bytes(word, "big"))
        repeated = frames[:1].expand(self.draws, -1, -1, -1)
        noisy = condition_batch(repeated, {}, len(frames), generator)
        modes = [latent_modes(self.engine, part) for part in frames.split(AT_ONCE)]
        conditions = [self.condition(part) for part in noisy[NOISY].split(AT_ONCE)]
        result = {
            "latents": torch.cat(modes).half(),
            "cond_latents": torch.cat(conditions).half(),
            "cond_aug": noisy["cond_aug"].float(),
            "image_embedding": self.clip(frames[:1])[0, 0].float(),
        }
        return {name: tensor.cpu().contiguous() for name, tensor in result.items()}


def precompute(encoders: Encoders, root: Path, entries: Iterable[Entry]) -> Iterator[Entry]:
    """Write ``NAME.latents.safetensors`` beside each ``NAME.mp4``; what is there is kept.

    Args:
        encoders: of a checkpoint.
        root: folder of the collection.
        entries: clips in files of their own.

    Yields:
        The clips with the places of these files.

    Raises:
        ValueError: a clip is damaged, or its latents are not finite.
    """
    for entry in entries:
        path = Path(entry.files[VIDEO].path).with_suffix(f".{LATENTS}")
        file = root / path
        if not file.exists():
            tensors = encoders.encode(read_clip(root, entry), entry.key)
            lost = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
            if lost:
                raise ValueError(f"{entry.key}: its {' and '.join(lost)} are not finite")
            unfinished = file.with_suffix(".part")
            unfinished.write_bytes(save(tensors))
            unfinished.replace(file)
        yield entry.with_file(LATENTS, Place(path.as_posix(), file.stat().st_size))
