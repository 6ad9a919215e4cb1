"""The video U-Net.

Stable Video Diffusion (arXiv 2311.15127, appendix D): the U-Net of Stable Diffusion 2.1 with a
temporal part in every residual block and every transformer. Shapes: b clips, t frames, n = b t
rows, c channels, k context tokens, e = 4 ``model_channels``, the width of the embedding.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sgm.modules.diffusionmodules.blocks import VideoResBlock
from sgm.modules.diffusionmodules.layers import (
    Upsample,
    group_norm,
    kernel_3d,
    sinusoidal_embedding,
    zero_init,
)
from sgm.modules.diffusionmodules.unet_plan import Block, Layer, plan_unet
from sgm.modules.video_attention import SpatialVideoTransformer

ATTENTION_TYPES = ("softmax", "softmax-xformers")


class Downsample(nn.Module):
    """3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> (n, c, ceil(h / 2), ceil(w / 2))."""
        return self.op(x)


class VideoUNet(nn.Module):
    """Denoise latents of video frames, given a picture, a context and a vector.

    Args:
        in_channels: channels of the input (noisy and condition latents).
        out_channels: channels of the output.
        model_channels: channels of the first level.
        channel_mult: channels of each level as multiples of ``model_channels``.
        num_res_blocks: residual blocks of a level.
        attention_resolutions: downsampling factors whose levels have attention.
        adm_in_channels: width of the vector conditioning ``y``.
        context_dim: channels of the context tokens.
        num_classes: ``sequential`` where there is a vector conditioning, else None.
        num_heads: attention heads, or -1.
        num_head_channels: channels of a head, or -1.
        transformer_depth: transformer blocks per attention layer.
        transformer_depth_middle: the same in the middle.
        time_context_dim: channels of the temporal context without ``use_spatial_context``.
        extra_ff_mix_layer: without effect, a field of published YAML files: temporal transformer
            blocks always begin with a feed-forward.
        use_spatial_context: the temporal context is the first frame's context.
        merge_strategy: how space and time are blended.
        merge_factor: start of the blend.
        video_kernel_size: kernel of the temporal convolutions over (t, h, w).
        use_linear_in_transformer: project tokens with linear layers.
        disable_temporal_crossattention: temporal transformers do without the context.
        spatial_transformer_attn_type: ``softmax``; ``softmax-xformers`` is the same.
        max_ddpm_temb_period: slowest wave of the frame-position embedding.
        dropout: probability inside residual blocks and transformers.
        use_checkpoint: while training, compute activations again instead of keeping them.
        dims: must be 2, a field of published YAML files.

    Raises:
        ValueError: parameters that contradict each other or that no published model has.
    """

    def __init__(
        self,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int | Sequence[int],
        attention_resolutions: Sequence[int],
        dropout: float = 0.0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        dims: int = 2,
        num_classes: str | None = None,
        use_checkpoint: bool = False,
        num_heads: int = -1,
        num_head_channels: int = -1,
        transformer_depth: int | Sequence[int] = 1,
        transformer_depth_middle: int | None = None,
        context_dim: int | None = None,
        time_context_dim: int | None = None,
        extra_ff_mix_layer: bool = False,
        use_spatial_context: bool = False,
        merge_strategy: str = "fixed",
        merge_factor: float = 0.5,
        spatial_transformer_attn_type: str = "softmax",
        video_kernel_size: int | Sequence[int] = 3,
        use_linear_in_transformer: bool = False,
        adm_in_channels: int | None = None,
        disable_temporal_crossattention: bool = False,
        max_ddpm_temb_period: float = 10_000,
    ) -> None:
        super().__init__()
        _check(dims, num_classes, adm_in_channels, spatial_transformer_attn_type)
        plan = plan_unet(
            in_channels=in_channels,
            model_channels=model_channels,
            channel_mult=channel_mult,
            num_res_blocks=num_res_blocks,
            attention_resolutions=attention_resolutions,
            transformer_depth=transformer_depth,
            transformer_depth_middle=transformer_depth_middle,
            num_heads=num_heads,
            num_head_channels=num_head_channels,
        )
        emb = 4 * model_channels
        merge = {"merge_strategy": merge_strategy, "merge_factor": merge_factor}
        residual = {
            "emb_channels": emb,
            "video_kernel_size": kernel_3d(
                video_kernel_size
                if isinstance(video_kernel_size, int)
                else tuple(video_kernel_size)
            ),
            "dropout": dropout,
            **merge,
        }
        attention = {
            "context_dim": context_dim,
            "time_context_dim": time_context_dim,
            "use_linear": use_linear_in_transformer,
            "use_spatial_context": use_spatial_context,
            "temporal_cross_attention": not disable_temporal_crossattention,
            "max_time_embed_period": max_ddpm_temb_period,
            "dropout": dropout,
            **merge,
        }

        def build(block: Block) -> VideoSequential:
            return VideoSequential(*(_build_layer(layer, residual, attention) for layer in block))

        self.in_channels, self.out_channels = in_channels, out_channels
        self.adm_in_channels, self.context_dim = adm_in_channels, context_dim
        self.model_channels = model_channels
        self.use_checkpoint = use_checkpoint
        self.downsampling = plan.downsampling
        self.time_embed = _embedding_mlp(model_channels, emb)
        self.label_emb = (
            nn.Sequential(_embedding_mlp(adm_in_channels, emb)) if adm_in_channels else None
        )
        self.input_blocks = nn.ModuleList(build(block) for block in plan.input_blocks)
        self.middle_block = build(plan.middle_block)
        self.output_blocks = nn.ModuleList(build(block) for block in plan.output_blocks)
        self.out = nn.Sequential(
            group_norm(plan.out_channels, 1e-5),
            nn.SiLU(),
            zero_init(nn.Conv2d(plan.out_channels, out_channels, 3, padding=1)),
        )

    def embed(self, timesteps: Tensor, y: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Noise levels (n,) and vector conditioning (n, adm_in_channels) -> (n, e)."""
        if (y is None) != (self.label_emb is None):
            raise ValueError("expected the vector conditioning y just where num_classes is set")
        emb = self.time_embed(sinusoidal_embedding(timesteps, self.model_channels).to(dtype))
        return emb if self.label_emb is None else emb + self.label_emb(y)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
        time_context: Tensor | None = None,
        num_video_frames: int = 1,
        image_only_indicator: Tensor | None = None,
    ) -> Tensor:
        """Denoise.

        Args:
            x: (b t, in_channels, h, w), with h and w divisible by :attr:`downsampling`.
            timesteps: (b t,), c_noise of the denoiser: a quarter of the log noise level.
            context: (b t, k, context_dim).
            y: (b t, adm_in_channels).
            time_context: (b, k, time_context_dim), without ``use_spatial_context``.
            num_video_frames: t.
            image_only_indicator: (b, t); non-zero where a row is an image and no video frame.

        Returns:
            (b t, out_channels, h, w).
        """
        emb = self.embed(timesteps, y, x.dtype)
        shared = (emb, context, time_context, num_video_frames, image_only_indicator)

        def run(block: nn.Module, h: Tensor) -> Tensor:
            if self.use_checkpoint and self.training and torch.is_grad_enabled():
                return checkpoint(block, h, *shared, use_reentrant=False)
            return block(h, *shared)

        h, skips = x, []
        for block in self.input_blocks:
            h = run(block, h)
            skips.append(h)
        h = run(self.middle_block, h)
        for block in self.output_blocks:
            h = run(block, torch.cat([h, skips.pop()], dim=1))
        return self.out(h)


class VideoSequential(nn.Sequential):
    """Layers one after the other, each given what its kind needs."""

    def forward(  # type: ignore[override]
        self,
        h: Tensor,
        emb: Tensor,
        context: Tensor | None,
        time_context: Tensor | None,
        num_frames: int,
        image_only_indicator: Tensor | None,
    ) -> Tensor:
        """(n, c_in, h, w) -> (n, c_out, h, w), or half or twice that size."""
        for layer in self:
            if isinstance(layer, VideoResBlock):
                h = layer(h, emb, num_frames, image_only_indicator)
            elif isinstance(layer, SpatialVideoTransformer):
                h = layer(h, context, num_frames, time_context, image_only_indicator)
            else:
                h = layer(h)
        return h


def _build_layer(layer: Layer, residual: dict[str, Any], attention: dict[str, Any]) -> nn.Module:
    match layer.kind:
        case "conv":
            return nn.Conv2d(layer.c_in, layer.c_out, 3, padding=1)
        case "down":
            return Downsample(layer.c_in)
        case "up":
            return Upsample(layer.c_in)
        case "res":
            return VideoResBlock(layer.c_in, layer.c_out, **residual)
        case "attention":
            width = layer.c_in // layer.heads
            return SpatialVideoTransformer(layer.c_in, layer.heads, width, layer.depth, **attention)


def _embedding_mlp(c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(c_in, c_out), nn.SiLU(), nn.Linear(c_out, c_out))


def _check(dims: int, num_classes: str | None, adm_in_channels: int | None, attn: str) -> None:
    if dims != 2:
        raise ValueError(f"dims: expected 2, got {dims}")
    if num_classes not in (None, "sequential"):
        raise ValueError(f"num_classes: expected 'sequential' or nothing, got {num_classes!r}")
    if (num_classes is None) != (adm_in_channels is None):
        raise ValueError("expected both of num_classes and adm_in_channels, or neither")
    if attn not in ATTENTION_TYPES:
        raise ValueError(
            f"spatial_transformer_attn_type: expected one of {', '.join(ATTENTION_TYPES)}; "
            f"got {attn!r}"
        )
