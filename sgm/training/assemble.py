"""From the parts that a small model's stages train to one checkpoint.

The stages train an autoencoder; a `DiffusionEngine` holds it twice: as the first stage, and as the
condition encoder with 1x1 convolutions around its latents and a decoder without time.
"""

import hashlib
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

State = dict[str, Tensor]

OTHER_SEED = 1000
"""Added to a run's seed for batches to measure on."""


def averaged_weights(state: Mapping[str, Any]) -> State:
    """Return the weights of a run's state: their average where trained, else themselves."""
    averages = {key: value for key, value in state["ema"].items() if key != "updates"}
    return {**state["model"], **averages}


def start_of_video_decoder(weights: State) -> State:
    """Let the last temporal convolution pass frames through, after training on pictures alone."""
    key = "decoder.conv_out.time_mix_conv"
    through = nn.init.dirac_(torch.empty_like(weights[f"{key}.weight"]))
    return weights | {
        f"{key}.weight": through,
        f"{key}.bias": torch.zeros_like(weights[f"{key}.bias"]),
    }


def condition_autoencoder(first_stage: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> State:
    """Make the condition autoencoder's weights from those of the first stage.

    Args:
        first_stage: weights of an `AutoencodingEngine`.
        like: state dict of the `AutoencoderKLModeOnly` to fill.

    Returns:
        Encoder and spatial decoder copied; the 1x1 convolutions as identities.
    """
    filled = {}
    for key, value in like.items():
        if "quant_conv" not in key:
            filled[key] = first_stage[key].clone()
        elif key.endswith("weight"):
            filled[key] = torch.eye(*value.shape[:2])[..., None, None]
        else:
            filled[key] = torch.zeros_like(value)
    return filled


def start_from_first_stage(engine: Any, weights: State) -> None:
    """Start the training of ``engine`` from a trained autoencoder.

    Args:
        engine: a `DiffusionEngine`, which gets it in both its places, or an `AutoencodingEngine`
            whose temporal decoder is to be trained.
        weights: of an `AutoencodingEngine`.
    """
    if hasattr(engine, "first_stage_model"):
        install_first_stage(engine, weights)
    else:
        engine.load_state_dict(start_of_video_decoder(weights))


def install_first_stage(engine: Any, weights: Mapping[str, Tensor]) -> None:
    """Put a trained autoencoder into a `DiffusionEngine`, in both its places.

    Raises:
        ValueError: the engine's conditioner has no autoencoder.
    """
    engine.first_stage_model.load_state_dict(weights)
    encoders = [e.encoder for e in engine.conditioner.embedders if hasattr(e, "encoder")]
    if not encoders:
        raise ValueError("conditioner_config: expected an embedder with an autoencoder, got none")
    for encoder in encoders:
        encoder.load_state_dict(condition_autoencoder(weights, encoder.state_dict()))


def digest(weights: Mapping[str, Tensor], *notes: object) -> str:
    """Return twelve hexadecimal digits that stand for weights and plain values."""
    sha = hashlib.sha256(repr(notes).encode())
    for key in sorted(weights):
        sha.update(key.encode() + weights[key].detach().float().cpu().numpy().tobytes())
    return sha.hexdigest()[:12]


@torch.no_grad()
def measure_latents(
    engine: Any, batches: Iterable[Mapping[str, Tensor]], count: int = 32
) -> dict[str, Any]:
    """Encode ``count`` batches of ``frames`` (b, t, 3, h, w) and measure the latents' modes."""
    device = next(engine.parameters()).device
    modes = []
    for batch in islice(batches, count):
        moments, _ = engine.encode(batch["frames"].to(device).flatten(0, 1), unregularized=True)
        modes.append(moments.chunk(2, dim=1)[0].cpu())
    return latent_statistics(torch.cat(modes))


def latent_statistics(latents: Tensor) -> dict[str, Any]:
    """Measure latents (n, z, h, w): mean and deviation by channel, and the scale factor.

    The scale factor gives the latents as a whole deviation 1, which the preconditioning assumes
    (EDM, arXiv 2206.00364, table 1, with sigma_data = 1).
    """
    x = latents.detach().double()
    return {
        "mean": [round(v, 4) for v in x.mean(dim=(0, 2, 3)).tolist()],
        "std": [round(v, 4) for v in x.std(dim=(0, 2, 3)).tolist()],
        "scale_factor": float(f"{1.0 / x.std().item():.4g}"),
    }


def write_half(weights: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write weights as one half-precision safetensors file, and read it back to check it.

    Raises:
        ValueError: a weight does not fit into half precision, or the file differs.
    """
    half = {key: value.detach().half().cpu().contiguous() for key, value in weights.items()}
    lost = [key for key, value in half.items() if not torch.isfinite(value).all()]
    if lost:
        raise ValueError(f"weights beyond the range of half precision: {', '.join(lost[:5])}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    save_file(half, temporary, dict(metadata))
    back = load_file(temporary)
    if back.keys() != half.keys() or not all(torch.equal(back[key], half[key]) for key in half):
        raise ValueError(f"{temporary} was not written right: is the disk full?")
    temporary.chmod(0o644)  # the writer's own default lets nobody else read it
    temporary.replace(path)
