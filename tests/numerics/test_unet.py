"""The video U-Net and its parts: recorded outputs, formulas by hand, and symmetries.

Recorded cases and the mistakes they have caught (each was made on purpose, in a copy):

- ``unet_small``: blend of space and time the other way round; rows taken as "(t b)"; GEGLU's gate
  and value exchanged, its GELU approximated; sines before cosines; the context of another clip;
  heads split as "(d heads)"; attention without its scale; no frame positions; skips taken in the
  wrong order; attention where svd has none.
- ``unet_small_image_only``: image rows blended like video rows.
- ``unet_odd_size``: height and width exchanged.
- ``unet_fixed_merge``: a fixed factor put through the sigmoid; 3x3x3 kernels run as (3, 1, 1).
- ``unet_quiet``: 1e-6 for 1e-5 in residual blocks, 1e-5 for 1e-6 before transformers.
- ``unet_grad``: a branch cut off from the gradient.
"""

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgm.modules.attention import GEGLU, CrossAttention
from sgm.modules.diffusionmodules.blending import AlphaBlender
from sgm.modules.diffusionmodules.layers import TemporalConv3d, kernel_3d, sinusoidal_embedding
from sgm.modules.diffusionmodules.unet_plan import plan_unet
from sgm.modules.diffusionmodules.video_model import VideoUNet
from sgm.modules.diffusionmodules.wrappers import OpenAIWrapper
from sgm.modules.video_attention import SpatialVideoTransformer
from tests.recorded import assert_recorded, filled, noise, recorded_config, relative_error
from tests.tiny import draw_weights, tiny_config

SVD = {"adm_in_channels": 768, "model_channels": 320, "num_head_channels": 64, "context_dim": 1024}
FIXED = {
    "merge_strategy": "fixed",
    "extra_ff_mix_layer": False,
    "video_kernel_size": 3,
    "use_linear_in_transformer": False,
}


def recorded_unet(quiet: bool = False, **changes) -> VideoUNet:
    params = recorded_config(context_dim=24).network_config.params
    with torch.device("meta"):
        net = VideoUNet(**(dict(params) | changes))
    return filled(net.to_empty(device="cpu"), quiet)


def recorded_inputs(case: str, clips: int, frames: int, h: int, w: int, context=24, adm=48):
    per_clip = {
        "timesteps": torch.linspace(-1.5, 1.6, clips),
        "context": noise(f"{case}context", clips, 1, context),
        "y": noise(f"{case}y", clips, adm),
    }
    rows = {key: value.repeat_interleave(frames, 0) for key, value in per_clip.items()}
    return {"x": noise(f"{case}x", clips * frames, 8, h, w), **rows}


def run(net: VideoUNet, inputs: dict[str, Tensor], clips: int, image_only: float = 0.0) -> Tensor:
    frames = len(inputs["x"]) // clips
    flags = torch.full((clips, frames), image_only)
    return net(**inputs, num_video_frames=frames, image_only_indicator=flags)


@pytest.mark.parametrize(
    ("case", "size", "image_only", "build"),
    [
        ("unet_small", (2, 4, 16, 24), 0.0, {}),
        ("unet_small_image_only", (2, 4, 16, 24), 1.0, {}),
        ("unet_odd_size", (1, 7, 8, 40), 0.0, {}),
        ("unet_fixed_merge", (2, 4, 16, 24), 0.0, FIXED),
        ("unet_quiet", (2, 4, 8, 8), 0.0, {"quiet": True}),
    ],
)
@torch.no_grad()
def test_recorded_outputs(case: str, size: tuple[int, ...], image_only: float, build: dict):
    """Catches what the head of this file lists."""
    out = run(recorded_unet(**build), recorded_inputs(case, *size), size[0], image_only)
    assert_recorded(case, out=out)


@pytest.mark.slow
@torch.no_grad()
def test_recorded_outputs_at_full_width():
    """1.5 billion weights, 6 GB. Catches: heads or groups that only fit small networks."""
    inputs = recorded_inputs("unet_full", 1, 2, 8, 8, context=1024, adm=768)
    assert_recorded("unet_full", out=run(recorded_unet(**SVD), inputs, 1))


def test_recorded_gradients():
    net = recorded_unet()
    out = run(net, recorded_inputs("unet_grad", 1, 3, 8, 8), 1)
    (out * noise("unet_gradg", *out.shape)).sum().backward()
    thinned = {
        "input_blocks.1.0.time_stack.in_layers.2.weight": slice(None),
        "middle_block.1.time_stack.0.attn1.to_q.weight": (slice(None, None, 4),) * 2,
        "output_blocks.5.1.time_stack.0.ff.net.2.weight": (slice(None, None, 4),) * 2,
        "time_embed.0.weight": slice(None),
        "label_emb.0.2.bias": slice(None),
    }
    gradients = {key: net.get_parameter(key).grad[part] for key, part in thinned.items()}
    assert_recorded("unet_grad", out=out.detach(), **gradients)


# --- parts, by formula ---


@pytest.mark.parametrize("kernel", [(3, 1, 1), (5, 1, 1), (3, 3, 3), (1, 3, 3)])
def test_temporal_convolution_is_a_3d_convolution(kernel: tuple[int, int, int]):
    """Catches: padding along space instead of time, height and width folded in another order."""
    layer = TemporalConv3d(5, 7, kernel).double()
    x = torch.randn(2, 5, 4, 3, 6, dtype=torch.float64)
    expected = F.conv3d(x, layer.weight, layer.bias, padding=[k // 2 for k in kernel])
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(
    ("strategy", "start", "alpha"),
    [("fixed", 0.3, 0.3), ("learned", 0.3, 1 / (1 + math.exp(-0.3)))],
)
def test_blend_weights_the_spatial_branch(strategy: str, start: float, alpha: float):
    """Catches: the branches exchanged, a fixed factor put through the sigmoid."""
    spatial, temporal = torch.randn(2, 6, 4, 3, 5)
    blender = AlphaBlender(start, strategy)
    out = blender(spatial, temporal, torch.ones(2, 3))  # these two know no images
    torch.testing.assert_close(out, alpha * spatial + (1 - alpha) * temporal)
    assert isinstance(blender.mix_factor, nn.Parameter) == (strategy == "learned")


@pytest.mark.parametrize("shape", [(6, 4, 3, 5), (6, 15, 4)])
def test_blend_leaves_images_alone(shape: tuple[int, ...]):
    """Catches: flags inverted, flags laid out as (t, b), flags on the wrong dimension."""
    spatial, temporal = torch.randn(2, *shape)
    flags = torch.tensor([[0, 1, 0], [0, 0, 1]])
    out = AlphaBlender(-0.4, "learned_with_images")(spatial, temporal, flags)
    alpha = 1 / (1 + math.exp(0.4))
    for row, image in enumerate([0, 1, 0, 0, 0, 1]):
        mixed = alpha * spatial[row] + (1 - alpha) * temporal[row]
        torch.testing.assert_close(out[row], spatial[row] if image else mixed)


def test_blend_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"merge_strategy.*'mean'"):
        AlphaBlender(0.5, "mean")
    with pytest.raises(ValueError, match="needs image_only_indicator"):
        AlphaBlender(0.5)(torch.zeros(2, 1), torch.zeros(2, 1))


@pytest.mark.parametrize("context_dim", [None, 6])
def test_attention_is_softmax_of_scaled_products(context_dim: int | None):
    """Catches: no division by sqrt(d), heads split as "(d heads)", keys and values exchanged."""
    layer = CrossAttention(8, context_dim, heads=2, dim_head=5).double()
    x = torch.randn(3, 7, 8, dtype=torch.float64)
    context = x if context_dim is None else torch.randn(3, 4, 6, dtype=torch.float64)
    q, k, v = layer.to_q(x), layer.to_k(context), layer.to_v(context)
    heads = []
    for part in (slice(0, 5), slice(5, 10)):
        weights = (q[..., part] @ k[..., part].mT / math.sqrt(5)).softmax(-1)
        heads.append(weights @ v[..., part])
    expected = layer.to_out(torch.cat(heads, -1))
    out = layer(x) if context_dim is None else layer(x, context)
    torch.testing.assert_close(out, expected)


def test_attention_to_one_token_is_its_value():
    """A softmax over one key is 1: neither query nor key matters. Catches: a bias or a residual."""
    layer = CrossAttention(8, 6, heads=2, dim_head=4).double()
    context = torch.randn(3, 1, 6, dtype=torch.float64)
    out = layer(torch.randn(3, 7, 8, dtype=torch.float64), context)
    torch.testing.assert_close(out, layer.to_out(layer.to_v(context)).expand(3, 7, 8))


def test_geglu_gates_with_its_second_half():
    """Catches: gate and value exchanged, the tanh approximation of GELU."""
    layer = GEGLU(3, 4).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    y = x @ layer.proj.weight.T + layer.proj.bias
    gate = y[:, 4:]
    expected = y[:, :4] * gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("dim", [8, 9])
@pytest.mark.parametrize("period", [10_000, 100])
def test_sinusoidal_embedding_by_hand(dim: int, period: float):
    """Catches: sines first, frequencies spaced by dim / 2 - 1, an ignored period."""
    numbers = [0.0, 6.0, 127.0, -1.75]
    waves = [[number * period ** (-i / 4) for i in range(4)] for number in numbers]
    rows = [[math.cos(a) for a in row] + [math.sin(a) for a in row] for row in waves]
    expected = F.pad(torch.tensor(rows), (0, dim - 8))
    out = sinusoidal_embedding(torch.tensor(numbers), dim, period)
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)  # float32 angles up to 127


def test_half_precision_numbers_are_embedded_in_float32():
    """Catches: frequencies in half precision (bfloat16 knows 127.5 and 128, nothing between)."""
    x = torch.tensor([0.5, 127.0], dtype=torch.bfloat16)
    assert torch.equal(sinusoidal_embedding(x, 16), sinusoidal_embedding(x.float(), 16))


@pytest.mark.parametrize(
    ("size", "kernel"), [(3, (3, 3, 3)), ([3, 1, 1], (3, 1, 1)), ((1, 3, 5), (1, 3, 5))]
)
def test_kernel_sizes(size: int | Sequence[int], kernel: tuple[int, int, int]):
    assert kernel_3d(size) == kernel


@pytest.mark.parametrize("size", [2, [3, 1], [3, 2, 1]])
def test_bad_kernel_sizes_are_refused(size: int | list[int]):
    with pytest.raises(ValueError, match="odd kernel sizes"):
        kernel_3d(size)


def spatial_video_transformer(**changes) -> SpatialVideoTransformer:
    params = {"context_dim": 6, "use_linear": True, "use_spatial_context": True} | changes
    layer = SpatialVideoTransformer(32, heads=2, dim_head=16, **params)
    draw_weights(layer, 0)
    return layer.double().eval()


def test_temporal_context_is_the_first_frames():
    """With the spatial cross-attention cut, only frames 0 and 3 of two clips of three count.

    Catches: the last frame's context, the mean over frames, the first clip's context for all.
    """
    layer = spatial_video_transformer()
    nn.init.zeros_(layer.transformer_blocks[0].attn2.to_out[0].weight)
    context = torch.randn(6, 1, 6, dtype=torch.float64, requires_grad=True)
    out = layer(torch.randn(6, 32, 2, 2, dtype=torch.float64), context, 3)
    for clip, first in ((out[:3], 0), (out[3:], 3)):
        (gradient,) = torch.autograd.grad(clip.square().sum(), context, retain_graph=True)
        counts = gradient.abs().sum((1, 2)) > 0
        assert counts.tolist() == [row == first for row in range(6)]


def test_temporal_context_of_its_own():
    """Catches: a temporal context that is overwritten, or taken per frame."""
    layer = spatial_video_transformer(use_spatial_context=False, time_context_dim=5)
    x = torch.randn(6, 32, 2, 2, dtype=torch.float64)
    context, time_context = (torch.randn(n, 1, c, dtype=torch.float64) for n, c in ((6, 6), (2, 5)))
    out = layer(x, context, 3, time_context)
    torch.testing.assert_close(layer(x, context, 3, time_context[:, 0]), out)
    other = layer(x, context, 3, time_context * torch.tensor([1.0, 2.0])[:, None, None])
    assert torch.equal(other[:3], out[:3])
    assert not torch.equal(other[3:], out[3:])


# --- symmetries ---


@pytest.fixture(scope="module")
def net() -> VideoUNet:
    net = VideoUNet(**tiny_config().model.params.network_config.params)
    draw_weights(net, 0)
    return net.eval()


def clips_of(count: int, frames: int = 3, size: int = 8) -> dict[str, Tensor]:
    return recorded_inputs("clips", count, frames, size, size)


@torch.no_grad()
def test_clips_do_not_influence_each_other(net: VideoUNet):
    """Catches: rows taken as "(t b)", norms over the batch, a context shared between clips."""
    inputs = clips_of(3)
    together = run(net, inputs, 3)
    order = [2, 0, 1]
    rows = torch.arange(9).reshape(3, 3)[order].flatten()
    moved = run(net, {key: value[rows] for key, value in inputs.items()}, 3)
    assert relative_error(moved, together[rows]) < 2e-6
    for clip in range(3):
        part = slice(3 * clip, 3 * clip + 3)
        alone = run(net, {key: value[part] for key, value in inputs.items()}, 1)
        assert relative_error(alone, together[part]) < 2e-6


def test_frames_of_a_clip_influence_each_other(net: VideoUNet):
    """Every frame of the same clip, and none of the other. Catches: a temporal part left out."""
    inputs = clips_of(2)
    inputs["x"].requires_grad_(True)
    out = run(net, inputs, 2)
    (gradient,) = torch.autograd.grad(out[0].square().sum(), inputs["x"])
    assert (gradient.abs().sum((1, 2, 3)) > 0).tolist() == [True] * 3 + [False] * 3


@torch.no_grad()
def test_frames_have_an_order(net: VideoUNet):
    """Catches: no frame positions, frame positions that restart or run over the batch."""
    inputs = clips_of(1)
    flipped = run(net, inputs | {"x": inputs["x"].flip(0)}, 1).flip(0)
    assert relative_error(flipped, run(net, inputs, 1)) > 0.01


@torch.no_grad()
def test_images_are_each_on_their_own(net: VideoUNet):
    """A clip of images equals clips of one image. Catches: images mixed with their neighbours."""
    inputs = clips_of(1)
    as_clip, as_images = run(net, inputs, 1, image_only=1.0), run(net, inputs, 3, image_only=1.0)
    assert relative_error(as_clip, as_images) < 2e-6


def test_recomputed_activations_give_the_same_gradients():
    """Catches: a checkpointed block that loses an argument, a gradient or its dropout's draws."""
    params = tiny_config().model.params.network_config.params
    gradients = []
    for use_checkpoint in (False, True):
        net = VideoUNet(**(dict(params) | {"use_checkpoint": use_checkpoint, "dropout": 0.2}))
        draw_weights(net, 0)
        torch.manual_seed(0)
        run(net.train(), clips_of(1), 1).square().mean().backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
    assert all(map(torch.equal, *gradients))


def test_checkpointing_keeps_fewer_activations():
    """Catches: a flag without effect."""
    kept = {}
    for use_checkpoint in (False, True):
        params = dict(tiny_config().model.params.network_config.params)
        net = VideoUNet(**(params | {"use_checkpoint": use_checkpoint})).train()
        numbers = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, numbers=numbers: numbers.append(x.numel()) or x, lambda x: x
        ):
            run(net, clips_of(1), 1)
        kept[use_checkpoint] = sum(numbers)
    assert kept[True] < 0.3 * kept[False]


@torch.no_grad()
def test_bfloat16_stays_near_float32(net: VideoUNet):
    """8 bits of mantissa: 2^-9 a rounding; some dozen layers add up to 1 %.

    Catches: a part that leaves its type, and noise levels embedded in half precision.
    """
    inputs = clips_of(2)
    half = VideoUNet(**tiny_config().model.params.network_config.params).bfloat16().eval()
    half.load_state_dict(net.state_dict())
    rounded = {k: v if k == "timesteps" else v.bfloat16() for k, v in inputs.items()}
    out = run(half, rounded, 2)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, run(net, inputs, 2)) < 0.02


def test_vector_conditioning_comes_just_where_it_is_expected(net: VideoUNet):
    inputs = clips_of(1)
    with pytest.raises(ValueError, match="vector conditioning y"):
        run(net, inputs | {"y": None}, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dims": 3}, "dims: expected 2, got 3"),
        ({"num_classes": 1000}, "num_classes.*'sequential'.*1000"),
        ({"num_classes": None}, "both of num_classes and adm_in_channels"),
        ({"spatial_transformer_attn_type": "linear"}, "softmax, softmax-xformers; got 'linear'"),
        ({"merge_strategy": "mean"}, "merge_strategy.*'mean'"),
        ({"video_kernel_size": [3, 3]}, "odd kernel sizes"),
        ({"model_channels": 40}, "divisible by 32, got 40|do not divide into heads"),
    ],
)
def test_impossible_parameters_are_refused(change: dict, message: str):
    params = dict(tiny_config().model.params.network_config.params)
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        VideoUNet(**(params | change))


# --- the plan ---


def kinds(blocks) -> list[str]:
    names = {"conv": "conv", "res": "res", "attention": "att", "down": "down", "up": "up"}
    return [
        " ".join(f"{names[layer.kind]}:{layer.c_in}>{layer.c_out}" for layer in block)
        for block in blocks
    ]


def test_plan_of_svd_is_the_published_layout():
    """By hand, from the shapes of the published checkpoint.

    Catches: an attention too many at the last level, skips in the wrong order, "up" at the wrong
    place, heads of the wrong width.
    """
    plan = plan_unet(
        in_channels=8,
        model_channels=320,
        channel_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        attention_resolutions=[4, 2, 1],
        num_head_channels=64,
    )
    assert kinds(plan.input_blocks) == [
        "conv:8>320",
        "res:320>320 att:320>320",
        "res:320>320 att:320>320",
        "down:320>320",
        "res:320>640 att:640>640",
        "res:640>640 att:640>640",
        "down:640>640",
        "res:640>1280 att:1280>1280",
        "res:1280>1280 att:1280>1280",
        "down:1280>1280",
        "res:1280>1280",
        "res:1280>1280",
    ]
    assert kinds([plan.middle_block]) == ["res:1280>1280 att:1280>1280 res:1280>1280"]
    assert kinds(plan.output_blocks) == [
        "res:2560>1280",
        "res:2560>1280",
        "res:2560>1280 up:1280>1280",
        "res:2560>1280 att:1280>1280",
        "res:2560>1280 att:1280>1280",
        "res:1920>1280 att:1280>1280 up:1280>1280",
        "res:1920>640 att:640>640",
        "res:1280>640 att:640>640",
        "res:960>640 att:640>640 up:640>640",
        "res:960>320 att:320>320",
        "res:640>320 att:320>320",
        "res:640>320 att:320>320",
    ]
    assert (plan.out_channels, plan.downsampling) == (320, 8)
    blocks = (*plan.input_blocks, plan.middle_block, *plan.output_blocks)
    attentions = [layer for block in blocks for layer in block if layer.kind == "attention"]
    assert all(layer.heads == layer.c_in // 64 and layer.depth == 1 for layer in attentions)


SMALL = {
    "in_channels": 8,
    "model_channels": 32,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [1, 2],
    "num_heads": 4,
}


def test_plan_with_numbers_per_level():
    """Catches: a list read for the wrong level, the middle's depth taken from the first level."""
    plan = plan_unet(**SMALL | {"num_res_blocks": [1, 2], "transformer_depth": [1, 3]})
    assert len(plan.input_blocks) == 1 + 1 + 1 + 2
    assert len(plan.output_blocks) == 2 + 3
    depths = [b[1].depth for b in plan.input_blocks if len(b) > 1]
    assert depths == [1, 3, 3]
    assert plan.middle_block[1].depth == 3
    assert plan_unet(**SMALL, transformer_depth_middle=5).middle_block[1].depth == 5
    assert plan_unet(**SMALL).middle_block[1].heads == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": -1}, "one of num_heads and num_head_channels, got -1 and -1"),
        ({"num_head_channels": 8}, "one of num_heads and num_head_channels, got 4 and 8"),
        ({"num_heads": 5}, "32 channels do not divide into heads"),
        ({"num_heads": -1, "num_head_channels": 24}, "32 channels do not divide into heads"),
        ({"num_heads": -1, "num_head_channels": 64}, "32 channels do not divide into heads"),
        ({"num_res_blocks": [1, 1, 1]}, "num_res_blocks: expected one number or 2"),
        ({"transformer_depth": [1]}, "transformer_depth: expected one number or 2"),
    ],
)
def test_impossible_plans_are_refused(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        plan_unet(**SMALL | change)


# --- the wrapper ---


class Recorder(nn.Module):
    """Keeps what it was called with."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=dtype))

    def forward(self, x, timesteps, context=None, y=None, **kwargs):
        self.seen = {"x": x, "timesteps": timesteps, "context": context, "y": y, **kwargs}
        return x[:, :4] * self.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrapper_hands_on_in_the_networks_type(dtype: torch.dtype):
    """Catches: condition latents before noisy ones, a rounded noise level, keys exchanged."""
    wrapper = OpenAIWrapper(Recorder(dtype))
    x, concat = torch.randn(2, 2, 4, 3, 3)
    c = {"concat": concat, "crossattn": torch.randn(2, 1, 5), "vector": torch.randn(2, 6)}
    t = torch.tensor([0.123456789, 1.0])
    out = wrapper(x, t, c, num_video_frames=2)
    seen = wrapper.diffusion_model.seen
    assert torch.equal(seen["x"], torch.cat([x, concat], 1).to(dtype))
    assert torch.equal(seen["context"], c["crossattn"].to(dtype))
    assert torch.equal(seen["y"], c["vector"].to(dtype))
    assert seen["timesteps"].dtype == t.dtype
    assert torch.equal(seen["timesteps"], t)
    assert seen["num_video_frames"] == 2
    assert out.dtype == torch.float32


def test_wrapper_does_without_conditioning():
    wrapper = OpenAIWrapper(Recorder(torch.float32))
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(wrapper(x, torch.zeros(2), {}), x)
    assert wrapper.diffusion_model.seen["context"] is wrapper.diffusion_model.seen["y"] is None
