"""What a loaded model takes on a device under each memory plan, counted on the meta device.

Nothing of the model's size is computed or allocated. Shapes: b clips, t frames, n = b t rows, z
latent channels, f the downsampling factor, h and w height and width of the latents.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sgm import kernels
from sgm.inference.budget import HIGH, MemoryPlan, Needs, Stage
from sgm.inference.footprint import peak_bytes
from sgm.inference.lockstep import decode_in_step
from sgm.inference.optimized import OptimizedDecoder
from sgm.inference.optimized.layers import lay_out_for_accelerator
from sgm.inference.optimized.transformer import transformer_rows
from sgm.inference.optimized.unet import Condition, OptimizedUNet
from sgm.inference.streaming import weight_bytes
from sgm.models.diffusion import DiffusionEngine
from sgm.modules.autoencoding.temporal_ae import VideoDecoder
from sgm.modules.diffusionmodules.model import Encoder
from sgm.modules.video_attention import SpatialVideoTransformer

M = TypeVar("M", bound=nn.Module)

# What of a plan decides the activations of a stage: plans that agree in it are counted once.
_MATTERS: dict[Stage, tuple[str, ...]] = {
    "encoding": (),
    "sampling": ("halves_in_turn", "feed_forward_chunks"),
    "decoding": ("decode_in_step", "park_on_host", "decode_chunk"),
}


@dataclass(frozen=True)
class Job:
    """What is to be computed.

    Attributes:
        frames: t.
        size: (h, w).
        clips: b, two with guidance.
        decoding_t: frames that are decoded at once, where the plan says nothing else.
        dtype: of the network.
        wide: of the autoencoders.
        form: of :mod:`sgm.kernels`, as the device takes it: ``sizes`` for Triton's.
    """

    frames: int
    size: tuple[int, int]
    clips: int
    decoding_t: int
    dtype: torch.dtype
    wide: torch.dtype
    form: kernels.Form = "reference"


def count_needs(
    engine: DiffusionEngine,
    job: Job,
    encoders: Sequence[tuple[nn.Module, torch.dtype]],
    make_network: Callable[[MemoryPlan], nn.Module],
    optimized_decoder: bool = True,
) -> Needs:
    """Count what a model needs; under each plan when it is first asked for.

    Args:
        engine: loaded, wherever its weights are.
        job: what is to be computed.
        encoders: what encoding uses, with its types.
        make_network: the network of a plan with its weights on the meta device: the optimised
            U-Net, or a :func:`meta_copy` of the plain one.
        optimized_decoder: whole chunks are decoded by the optimised decoder.
    """
    plain: Any = engine.model.diffusion_model
    decoder: Any = engine.first_stage_model.decoder
    network = make_network(HIGH)
    encoder_weights = [_bytes(meta_copy(part, dtype)) for part, dtype in encoders]
    weights: dict[Stage, int] = {
        "encoding": sum(encoder_weights),
        "sampling": _bytes(network),
        "decoding": _bytes(meta_copy(decoder, job.wide)),
    }

    @cache
    def count(stage: Stage, plan: MemoryPlan) -> int:
        if stage == "encoding":
            return max(encoder_peaks())
        with kernels.use(job.form):
            if stage == "sampling":
                return network_peak(plain, make_network(plan), job, plan.halves_in_turn)
            return decoder_peak(decoder, job, plan, optimized_decoder)

    @cache
    def encoder_peaks() -> list[int]:
        f = engine.first_stage_model.downsampling
        return [encoder_peak(part, dtype, job, f) for part, dtype in encoders]

    def one_encoder() -> int:
        return max(map(sum, zip(encoder_weights, encoder_peaks(), strict=True)))

    def activations(stage: Stage, plan: MemoryPlan) -> int:
        return count(stage, replace(HIGH, **{key: getattr(plan, key) for key in _MATTERS[stage]}))

    blocks = tuple(weight_bytes(block) for block in blocks_of(network))
    return Needs(weights, blocks, activations, one_encoder)


def blocks_of(network: Any) -> list[nn.Module]:
    """The blocks of a U-Net, plain or optimised, in the order of their calls."""
    middle = network.middle_block
    middle = list(middle) if isinstance(middle, nn.ModuleList) else [middle]
    return [*network.input_blocks, *middle, *network.output_blocks]


def network_peak(plain: Any, network: nn.Module, job: Job, in_turn: bool) -> int:
    """Activations of one step of sampling, and what is kept for all steps.

    Args:
        plain: the U-Net as loaded.
        network: what samples, on the meta device.
        job: what is to be computed.
        in_turn: clip by clip.
    """
    clips = 1 if in_turn else job.clips
    n, (h, w) = clips * job.frames, job.size
    transformers = [m for m in plain.modules() if isinstance(m, SpatialVideoTransformer)]
    first: Any = transformers[0].transformer_blocks[0]
    place = partial(torch.Tensor.to, device="meta", dtype=job.dtype)
    empty = partial(torch.empty, device="meta", dtype=job.dtype)
    token = empty(n, 1, first.attn2.to_v.in_features)

    def condition() -> Condition:
        rows = tuple(transformer_rows(each, place, token, job.frames) for each in transformers)
        picture = empty(clips, h, w, plain.model_channels)
        return Condition(job.frames, picture, empty(1, 4 * plain.model_channels), rows, None)

    def optimized() -> None:
        latents = empty(n, plain.out[-1].out_channels, h, w)
        for each in [condition() for _ in range(job.clips // clips)]:
            network(latents, empty(1), each)

    def as_loaded() -> None:
        x = empty(n, plain.input_blocks[0][0].in_channels, h, w)
        vector = plain.label_emb and empty(n, plain.label_emb[0][0].in_features)
        frames = {"num_video_frames": job.frames}
        images = torch.zeros(clips, job.frames, device="meta")
        network(x, empty(n), token, vector, **frames, image_only_indicator=images)

    return peak_bytes(optimized if isinstance(network, OptimizedUNet) else as_loaded)


def encoder_peak(part: nn.Module, dtype: torch.dtype, job: Job, f: int) -> int:
    """Activations of encoding the picture; what is no autoencoder's encoder takes less."""
    if not isinstance(part, Encoder):
        return 0
    picture = torch.empty(1, 3, f * job.size[0], f * job.size[1], device="meta", dtype=dtype)
    encoder = meta_copy(part, dtype)
    return peak_bytes(lambda: encoder(picture))


def decoder_peak(plain: Any, job: Job, plan: MemoryPlan, optimized: bool) -> int:
    """Activations of decoding one chunk under a plan.

    What is parked on the host leaves a part and its neighbours: as much as three frames at most.
    """
    chunk = plan.decode_chunk.frames if plan.decode_chunk else None
    t = min(job.frames, chunk or job.decoding_t)

    def latents(t: int) -> Tensor:
        return torch.empty(t, plain.conv_in.in_channels, *job.size, device="meta", dtype=job.wide)

    if not plan.decode_in_step:
        place = partial(torch.Tensor.to, device="meta", dtype=job.wide)
        decoder = OptimizedDecoder(plain, place) if optimized else meta_copy(plain, job.wide)
        lay_out_for_accelerator(decoder)
        timesteps = {"timesteps": t} if isinstance(plain, VideoDecoder) else {}
        return peak_bytes(lambda: decoder(latents(t), **timesteps))
    t = min(t, 3) if plan.park_on_host else t
    decoder = meta_copy(plain, job.wide)
    return peak_bytes(lambda: decode_in_step(decoder, latents(t)))


def meta_copy(module: M, dtype: torch.dtype) -> M:
    """The same layers with weights of another type that have no values."""
    tensors = (*module.parameters(), *module.buffers())
    memo = {id(each): _without_values(each, dtype) for each in tensors}
    return copy.deepcopy(module, memo).eval().requires_grad_(False)


def _without_values(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    number = dtype if tensor.is_floating_point() else tensor.dtype
    empty = torch.empty_like(tensor.data, device="meta", dtype=number)
    return nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
