"""The optimised networks against the plain ones, in float64: what they leave out was nothing.

Both sums have the same terms in another order, so that float64 leaves a relative difference of
about 1e-15; a term too many or too few is larger by ten orders of magnitude. Each test names the
saving of docs/performance.md that it holds to its word.
"""

import copy
import logging
import math

import pytest
import torch
from torch import Tensor, nn

from sgm.inference import SamplingOptions, VideoPipeline
from sgm.inference.optimized import OptimizedDecoder, OptimizedNetwork
from sgm.inference.optimized.layers import (
    Convolution,
    Linear,
    TemporalConvolution,
    UpsampleConvolution,
)
from sgm.inference.optimized.scaling import FLOAT16_SCALE, scale_stream
from sgm.inference.optimized.transformer import transformer_rows
from sgm.inference.optimized.unet import OptimizedUNet
from sgm.inference.specs import ROOT
from sgm.modules.autoencoding.temporal_ae import VideoDecoder
from sgm.modules.diffusionmodules.layers import TemporalConv3d, Upsample
from sgm.modules.diffusionmodules.model import Decoder
from sgm.modules.diffusionmodules.sampling import EulerEDMSampler
from sgm.modules.diffusionmodules.video_model import VideoUNet
from sgm.modules.diffusionmodules.wrappers import OpenAIWrapper
from sgm.modules.video_attention import SpatialVideoTransformer
from tests.recorded import filled, noise, recorded_config, relative_error

MATHS = "sgm.modules.diffusionmodules"
T, CLIPS, EXACT = 3, 2, 1e-13
N = T * CLIPS

# Parameters that published models have, and those that only a researcher's YAML has.
NETWORKS = {
    "svd": {},
    "without vector": {"num_classes": None, "adm_in_channels": None},
    "fixed blends, 3x3x3, 1x1 convolutions": {
        "merge_strategy": "fixed",
        "video_kernel_size": 3,
        "use_linear_in_transformer": False,
    },
    "learned blends, two blocks": {"merge_strategy": "learned", "transformer_depth": 2},
    "no temporal cross-attention": {"disable_temporal_crossattention": True},
}


def double(x: Tensor) -> Tensor:
    return x.detach().double()


def half(x: Tensor) -> Tensor:
    return x.detach().half()


# Of 64 channels, for a GroupNorm of one channel per group undoes every embedding; not of 256.
CHANNELS = {"model_channels": 64, "channel_mult": [1, 2, 2, 2]}


def wrapped(**changes) -> OpenAIWrapper:
    params = dict(recorded_config(context_dim=24).network_config.params)
    with torch.device("meta"):
        net = VideoUNet(**(params | CHANNELS | changes))
    return OpenAIWrapper(filled(net.to_empty(device="cpu")).double()).requires_grad_(False)


@pytest.fixture(scope="module")
def plain() -> OpenAIWrapper:
    """The network of svd, which no test changes; drawing its weights takes a second."""
    return wrapped()


def conditioning(tokens: int = 1, per_frame: bool = False) -> dict[str, Tensor]:
    """Of two clips, the first without its picture as in guidance."""
    rows = N if per_frame else CLIPS
    picture = noise("picture", CLIPS, 4, 8, 16)
    context = noise("context", CLIPS, tokens, 24)
    picture[0] = context[0] = 0
    vector = noise("vector", rows, 48) if per_frame else noise("vector", 1, 48).expand(rows, 48)
    return {
        "concat": picture.repeat_interleave(T, 0).double(),
        "crossattn": context.repeat_interleave(T, 0).double(),
        "vector": vector.repeat_interleave(N // rows, 0).double(),
    }


def call(network, c, images: Tensor | None = None, level: float = 0.3) -> Tensor:
    images = torch.zeros(CLIPS, T) if images is None else images
    x, t = noise("x", N, 4, 8, 16).double(), torch.tensor([level])
    with torch.inference_mode():
        return network(x, t, c, num_video_frames=T, image_only_indicator=images)


@pytest.mark.parametrize("changes", NETWORKS.values(), ids=NETWORKS.keys())
def test_the_whole_network(plain, changes):
    """Catches: A to O, of which each was broken once: a row of the other half, a blend the other
    way round, an embedding not taken off again, a shift of another block, skips out of order."""
    plain, c = wrapped(**changes) if changes else plain, conditioning()
    if "num_classes" in changes:
        del c["vector"]
    expected = call(plain, c)
    assert relative_error(call(OptimizedNetwork(plain, double), c), expected) < EXACT


@pytest.fixture
def late_bias(monkeypatch):
    """As on CUDA devices, where the kernel after a convolution adds its bias."""
    monkeypatch.setattr("sgm.inference.optimized.layers._LATE_BIAS", {"cpu"})


@pytest.mark.usefixtures("late_bias")
@pytest.mark.parametrize("changes", NETWORKS.values(), ids=NETWORKS.keys())
@pytest.mark.parametrize("images", [None, [[0, 0, 0], [1, 0, 1]]])
def test_biases_that_the_next_kernel_adds(changes, images):
    """P. Catches: a bias lost, added twice, not weighted, or given to single images."""
    plain, c = wrapped(**changes), conditioning()
    if "num_classes" in changes:
        del c["vector"]
    marks = None if images is None else torch.tensor(images, dtype=torch.float32)
    expected = call(plain, c, marks)
    assert relative_error(call(OptimizedNetwork(plain, double), c, marks), expected) < EXACT


@pytest.mark.usefixtures("late_bias")
@pytest.mark.parametrize("skip_video", [False, True])
def test_biases_in_the_decoder(skip_video):
    """P. Catches: the same, where no embedding takes them along."""
    params = recorded_config().first_stage_config.params.decoder_config.params
    plain = filled(VideoDecoder(**params)).double()
    z = noise("z", N, 4, 4, 6).double()
    with torch.inference_mode():
        expected = plain(z, timesteps=T, skip_video=skip_video)
        out = OptimizedDecoder(plain, double)(z, timesteps=T, skip_video=skip_video)
    assert relative_error(out, expected) < EXACT


@pytest.mark.parametrize("images", [[[0, 0, 0], [1, 0, 1]], [[1, 1, 1], [1, 1, 1]]])
def test_single_images_pass_the_temporal_layers(plain, images):
    """Catches: E and F without their general form; marks of the wrong row."""
    c, marks = conditioning(), torch.tensor(images, dtype=torch.float32)
    expected = call(plain, c, marks)
    assert relative_error(call(OptimizedNetwork(plain, double), c, marks), expected) < EXACT
    assert relative_error(call(plain, c), expected) > 1e-3  # the marks matter


def test_a_vector_of_its_own_for_every_frame(plain):
    """Catches: D where rows differ, as the camera of sv3d_p makes them."""
    c = conditioning(per_frame=True)
    expected = call(plain, c)
    assert relative_error(call(OptimizedNetwork(plain, double), c), expected) < EXACT


def test_a_picture_of_its_own_for_every_frame(plain):
    """L. Catches: the condition latents of a clip's first frame taken for all."""
    c = conditioning() | {"concat": noise("pictures", N, 4, 8, 16).double()}
    assert relative_error(call(OptimizedNetwork(plain, double), c), call(plain, c)) < EXACT


def test_halves_in_turn(plain):
    """Catches: a part that is given the rows, the frames or the marks of another."""
    c, marks = conditioning(per_frame=True), torch.tensor([[0, 0, 0], [0, 1, 0.0]])
    in_turn = OptimizedNetwork(plain, double, clips_at_once=1)
    for images in (None, marks):
        c = dict(c)
        assert relative_error(call(in_turn, c, images), call(plain, c, images)) < EXACT


def test_another_conditioning_is_seen(plain):
    """Catches: the rows of the last run in the next one."""
    c = conditioning()
    network = OptimizedNetwork(plain, double)
    before = call(network, c)
    other = c | {"crossattn": 2 * c["crossattn"], "vector": -c["vector"]}
    assert relative_error(call(network, other), call(plain, other)) < EXACT
    assert relative_error(call(network, c), before) == 0
    assert relative_error(call(network, c, level=0.9), call(plain, c, level=0.9)) < EXACT


def test_several_context_tokens_take_the_plain_network(plain, caplog):
    """Catches: the first token taken for all; A and B where they do not hold."""
    c = conditioning(tokens=2)
    with caplog.at_level(logging.INFO):
        assert relative_error(call(OptimizedNetwork(plain, double), c), call(plain, c)) == 0
    assert "plain network" in caplog.text


def test_stored_weights_stay_as_they_are(plain):
    """Catches: derived weights written over stored ones, in building or in running."""
    c = conditioning()
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    call(OptimizedNetwork(plain, double), c)
    after = plain.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_cross_attention_to_one_token():
    """A and B by the attention itself: its result is the same wherever it is asked."""
    layer = SpatialVideoTransformer(64, 4, 16, context_dim=24, use_spatial_context=True)
    layer = filled(layer).double().requires_grad_(False)
    context = noise("token", N, 1, 24).double()
    rows = transformer_rows(layer, double, context, T)
    query = noise("query", N, 5, 64).double()
    spatial = layer.transformer_blocks[0].attn2(query, context)
    assert relative_error(rows.spatial[0][:, None].expand_as(spatial), spatial) < EXACT
    first = context[::T].repeat_interleave(T, 0)
    temporal = layer.time_stack[0].attn2(query, first)
    assert relative_error(rows.temporal[0][:, None].expand_as(temporal), temporal) < EXACT
    positions = layer.frame_positions(N, T, query)[:T, 0]  # C
    assert relative_error(rows.positions, positions) < EXACT


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 3)])
def test_upsampling_by_four_phases(size):
    """I. Catches: phases exchanged, rows for columns, a border that wraps around."""
    plain = filled(Upsample(6, 5)).double().requires_grad_(False)
    x = noise("small", 2, *size, 6).double()
    expected = plain(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert relative_error(UpsampleConvolution(plain.conv, double)(x), expected) < EXACT


@pytest.mark.parametrize("kernel", [(3, 1, 1), (5, 1, 1), (1, 1, 1), (3, 3, 3)])
def test_temporal_convolution(kernel):
    """O. Catches: clips that run into each other, padding of another length."""
    plain = filled(TemporalConv3d(6, 5, kernel)).double().requires_grad_(False)
    x = noise("clip", N, 2, 4, 6).double()
    clips = x.view(CLIPS, T, 2, 4, 6).permute(0, 4, 1, 2, 3)
    expected = nn.functional.conv3d(clips, plain.weight, plain.bias, padding=plain.padding)
    out = TemporalConvolution(plain, double)(x, T).view(CLIPS, T, 2, 4, 5)
    assert relative_error(out.permute(0, 4, 1, 2, 3), expected) < EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_in_the_layout_of_onednn(dtype):
    """Catches: a packed weight at another size than it was packed for, a lost bias or stride.

    The products are sums of 576 and 64 terms of about 1, rounded once in bfloat16 (2^-9).
    """
    bound = 1e-6 if dtype == torch.float32 else 4e-3
    convolution = filled(nn.Conv2d(64, 48, 3, stride=2, padding=1))
    linear = filled(nn.Linear(64, 48))
    packed = (
        Convolution.of(convolution, lambda x: x.to(dtype)),
        Linear.of(linear, lambda x: x.to(dtype)),
    )
    rounded = [copy.deepcopy(layer).to(dtype).double() for layer in (convolution, linear)]
    for size in (8, 20, 3):
        x = noise("map", 2, size, size + 1, 64).to(dtype)
        with torch.inference_mode():
            expected = rounded[0](x.double().permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            assert relative_error(packed[0](x), expected) < bound
            assert relative_error(packed[1](x), rounded[1](x.double())) < bound
    assert all(layer.packed for layer in packed), "this CPU's PyTorch packs weights"


@pytest.mark.parametrize("skip_video", [False, True])
@pytest.mark.parametrize("merge", ["learned", "fixed"])
def test_the_video_decoder(merge, skip_video):
    """Catches: the decoder's blend taken for the U-Net's, levels out of order, no last layer."""
    params = recorded_config().first_stage_config.params.decoder_config.params
    kernel = {"video_kernel_size": [3, 1, 1], "alpha": 0.3, "merge_strategy": merge}
    plain = filled(VideoDecoder(**(dict(params) | kernel))).double()
    z = noise("z", N, 4, 4, 6).double()
    with torch.inference_mode():
        expected = plain(z, timesteps=T, skip_video=skip_video)
        out = OptimizedDecoder(plain, double)(z, timesteps=T, skip_video=skip_video)
    assert relative_error(out, expected) < EXACT


def video_decoder() -> VideoDecoder:
    params = recorded_config().first_stage_config.params.decoder_config.params
    return filled(VideoDecoder(**(dict(params) | {"video_kernel_size": [3, 1, 1]})))


@pytest.mark.parametrize("scale", [1 / 32, 2.0**10])
def test_a_scaled_residual_stream(scale):
    """Catches: a layer that writes to the stream unscaled, a norm with the old epsilon.

    A power of two, so that not even the rounding differs.
    """
    plain, z = video_decoder().double(), noise("z", N, 4, 4, 6).double()
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    with torch.inference_mode():
        assert (
            relative_error(scale_stream(plain, scale)(z, timesteps=T), plain(z, timesteps=T)) == 0
        )
    assert all(torch.equal(before[key], value) for key, value in plain.state_dict().items())


def test_float16_holds_a_loud_decoder():
    """Catches: black frames. This stream exceeds 65504, the end of float16.

    The bound is twice what float16 makes of a decoder whose stream is small (0.0026).
    """
    quiet, z = video_decoder(), noise("z", N, 4, 4, 6)
    loud = scale_stream(quiet, 2.0**14)
    with torch.inference_mode():
        expected = quiet(z, timesteps=T)
        assert relative_error(loud(z, timesteps=T), expected) < 1e-5
        assert not OptimizedDecoder(loud, half)(z.half(), timesteps=T).isfinite().all()
        scaled = OptimizedDecoder(scale_stream(loud, FLOAT16_SCALE), half)
        assert relative_error(scaled(z.half(), timesteps=T), expected) < 5e-3


@pytest.mark.parametrize("changes", [{}, {"attn_type": "none", "tanh_out": True}])
def test_the_image_decoder(changes):
    """Catches: a decoder without time layers taken for one that has them."""
    params = recorded_config().first_stage_config.params.encoder_config.params
    plain = filled(Decoder(**(dict(params) | changes))).double()
    z = noise("z", 2, 4, 4, 6).double()
    with torch.inference_mode():
        assert relative_error(OptimizedDecoder(plain, double)(z), plain(z)) < EXACT


def test_pipelines_with_and_without_give_the_same_frames():
    """Catches: an optimised network that the pipeline does not use, or uses with other inputs."""
    options = SamplingOptions(num_steps=3, num_frames=5, dtype="float32", device="cpu")
    frames = {}
    for level in ("none", "exact"):
        pipeline = VideoPipeline.from_spec(
            "svd_tiny", device="cpu", dtype="float32", optimize=level
        )
        assert isinstance(pipeline.placement.network, OptimizedNetwork) == (level == "exact")
        asked = options.replace(optimize=level, output="tensor")
        frames[level] = pipeline(ROOT / "assets" / "sample.jpg", asked)
    assert relative_error(frames["exact"], frames["none"]) < 1e-5
    with pytest.raises(ValueError, match="optimize is exact in this pipeline, got none"):
        pipeline(ROOT / "assets" / "sample.jpg", options.replace(optimize="none"))


def test_deep_features_of_the_call_before(plain):
    """Catches: features reused at the wrong place, for the wrong half, or after a new run began.

    The plain network does the same where a hook puts back what its last inner block gave before.
    """
    c = conditioning()
    network = OptimizedNetwork(plain, double, clips_at_once=1, reuse=2)
    assert relative_error(call(network, c, level=0.9), call(plain, c, level=0.9)) < EXACT
    blocks = plain.diffusion_model.output_blocks
    inner = blocks[len(blocks) - network.unet.outer - 2]
    kept: list[Tensor] = []
    with inner.register_forward_hook(lambda *parts: kept.append(parts[-1])):
        call(plain, c, level=0.9)
    with inner.register_forward_hook(lambda *_: kept[0]):
        expected = call(plain, c)
    assert relative_error(call(network, c), expected) < EXACT
    assert relative_error(expected, call(plain, c)) > 1e-3  # it is an approximation
    assert relative_error(call(network, c), call(plain, c)) < EXACT  # every second call is whole
    other = dict(c)
    assert relative_error(call(network, other), call(plain, other)) < EXACT


@pytest.mark.parametrize("sigma", [0.05, 0.5])
def test_guidance_within_its_interval(sigma):
    """Catches: an interval the other way round, the unconditional half taken for the other."""
    sampler = EulerEDMSampler(
        discretization_config={
            "target": f"{MATHS}.discretizer.EDMDiscretization",
            "params": {"sigma_max": sigma},
        },
        guider_config={"target": f"{MATHS}.guiders.VanillaCFG", "params": {"scale": 3.0}},
    )
    sampler.guider.interval = (0.3, math.inf)
    c, uc = {"vector": torch.ones(2, 1)}, {"vector": torch.zeros(2, 1)}
    seen = []

    def denoiser(x, level, cond):
        seen.append(cond["vector"].flatten().tolist())
        return torch.zeros_like(x)

    sampler(denoiser, torch.zeros(2, 1), c, uc, num_steps=1)
    assert seen == [[0, 0, 1, 1] if sigma > 0.3 else [1, 1]]


def test_a_fast_pipeline_is_close():
    """Catches: approximations that are not switched on, or break the video."""
    options = SamplingOptions(num_steps=10, dtype="float32", output="tensor")
    frames = {}
    for level in ("exact", "fast"):
        pipeline = VideoPipeline.from_spec(
            "svd_tiny", device="cpu", dtype="float32", optimize=level
        )
        frames[level] = pipeline(ROOT / "assets" / "sample.jpg", options.replace(optimize=level))
    error = (frames["fast"] - frames["exact"]).square().mean()
    assert 35 < -10 * error.log10() < 70


def test_only_layers_that_it_knows():
    """Catches: a layer that is left out in silence."""
    plain = wrapped().diffusion_model
    plain.middle_block.insert(1, nn.Dropout())
    with pytest.raises(TypeError, match="Dropout"):
        OptimizedUNet(plain, double)
