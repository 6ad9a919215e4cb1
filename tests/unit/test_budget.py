"""Memory plans, and the estimate that chooses them, against memory that was really taken."""

import gc
import os
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripts.bench.floor import draw_blends
from sgm import kernels
from sgm.inference.budget import HIGH, LOW, MIN, PLANS, Needs, free_bytes, next_smaller, plan_memory
from sgm.inference.footprint import peak_bytes
from sgm.inference.lockstep import decode_in_step
from sgm.inference.needs import Job, blocks_of, count_needs, meta_copy, network_peak
from sgm.inference.optimized.eight_bits import EightBitLinear, use_eight_bits
from sgm.inference.optimized.layers import Convolution, lay_out_for_accelerator
from sgm.inference.optimized.unet import OptimizedUNet
from sgm.inference.options import SamplingOptions
from sgm.inference.placement import needs_of
from sgm.inference.settings import read_config, resolve
from sgm.inference.specs import ROOT, SPECS, find_config
from sgm.modules.diffusionmodules.model import Encoder
from sgm.util import instantiate_from_config
from tests.measured import allocated_peak
from tests.tiny import tiny_engine

MEGA = 10**6


@pytest.fixture(scope="module")
def engine():
    return tiny_engine()


SHAPES = [(4, 16, 16), (2, 24, 32), (5, 16, 8)]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("part", ["network", "decoder", "in step", "in bands", "encoder"])
def test_estimate_against_the_allocator(engine, part, shape, dtype):
    """30 combinations, within a tenth.

    Caught: memory that views or weights are counted for again, tensors followed beyond their end,
    attention's matrix of weights, copies inside of operations left out.
    """
    t, h, w = shape
    first_stage = engine.first_stage_model

    def network(model: nn.Module, make) -> None:
        n = 2 * t
        model(
            make(n, 8, h, w),
            make(n),
            make(n, 1, 24),
            make(n, 48),
            num_video_frames=t,
            image_only_indicator=make(2, t),
        )

    calls = {
        "network": (engine.model.diffusion_model, network),
        "decoder": (first_stage.decoder, lambda m, make: m(make(t, 4, h, w), timesteps=t)),
        "in step": (first_stage.decoder, lambda m, make: decode_in_step(m, make(t, 4, h, w), 2)),
        "in bands": (
            first_stage.decoder,
            lambda m, make: decode_in_step(m, make(t, 4, h, w), 1, 3),
        ),
        "encoder": (first_stage.encoder, lambda m, make: m(make(t, 3, 4 * h, 4 * w))),
    }
    model, call = calls[part]
    real = meta_copy(model, dtype).to_empty(device="cpu")
    real.load_state_dict(model.state_dict())
    with torch.no_grad():
        measured = allocated_peak(lambda: call(real, partial(torch.zeros, dtype=dtype)))
    copy, empty = meta_copy(model, dtype), partial(torch.empty, device="meta", dtype=dtype)
    estimated = peak_bytes(lambda: call(copy, empty))
    assert estimated == pytest.approx(measured, rel=0.1)


def test_memory_that_is_followed():
    """By hand, in units of a megabyte. Caught: views counted, inputs counted, results not freed."""
    x, weight = (torch.empty(1000, 250, device="meta") for _ in range(2))

    def run() -> Tensor:
        y = x + 1  # 1
        y = y.t().reshape(-1).view(500, 500)  # 2, then 1
        y = y * 2  # 2, then 1
        z = torch.cat([y, y])  # 3
        y += 1
        del y  # 2
        return z.t() @ z  # 3

    gc.disable()  # memory is counted by references alone
    try:
        assert peak_bytes(run) == 3 * MEGA
        assert peak_bytes(weight.t) == 0
        assert peak_bytes(x.relu_) == 0
    finally:
        gc.enable()


def test_convolutions_give_the_layout_that_they_get():
    """By hand. Catches: a copy counted that no device makes, as the meta device lays out anew."""
    x = torch.empty(1, 10, 50, 50, device="meta").to(memory_format=torch.channels_last)
    weight = torch.empty(10, 10, 3, 3, device="meta").to(memory_format=torch.channels_last)

    def run() -> Tensor:
        out = F.conv2d(x, weight, padding=1)
        return out.permute(0, 2, 3, 1).contiguous()

    assert peak_bytes(run) == x.nbytes


def make_needs(activations: dict[str, tuple[int, ...]]) -> Needs:
    """Weights 5, 30 and 2, blocks 8, 12 and 3, activations by stage and plan, an encoder of 4."""
    return Needs(
        {"encoding": 5, "sampling": 30, "decoding": 2},
        (8, 12, 3),
        lambda stage, plan: activations[stage][PLANS.index(plan)],
        lambda: 4,
    )


NEEDS = make_needs(
    {"encoding": (1,) * 5, "sampling": (40, 40, 20, 11, 8), "decoding": (60, 35, 35, 20, 9)}
)


def test_what_plans_need():
    """By hand. Caught: weights of other stages left out or kept, streamed blocks counted whole."""
    peaks = [NEEDS.by_stage(plan) for plan in PLANS]
    assert peaks[0] == {"encoding": 38, "sampling": 77, "decoding": 97}
    assert peaks[1] == {"encoding": 4, "sampling": 70, "decoding": 37}
    assert peaks[2]["sampling"] == 50
    assert peaks[3] == {"encoding": 4, "sampling": 41, "decoding": 22}
    assert peaks[4] == {"encoding": 4, "sampling": 7 + 2 * 12 + 8, "decoding": 11}


@pytest.mark.parametrize(
    ("free", "name"),
    [(200, "high"), (108, "high"), (107, "unload"), (60, "halves"), (46, "low"), (45, "min")],
)
def test_auto_takes_the_fastest_that_fits(free, name):
    """With a tenth to spare. Caught: no margin, a stage that is not looked at, the smallest plan
    first."""
    assert plan_memory("auto", free, lambda: NEEDS).name == name


def test_auto_takes_the_smallest_where_nothing_fits():
    assert plan_memory("auto", 1, lambda: NEEDS) is MIN


@pytest.mark.parametrize(("mode", "plan"), [("high", HIGH), ("low", LOW), ("min", MIN)])
def test_named_modes_count_nothing(mode, plan):
    def refuse():
        raise AssertionError("counted")

    assert plan_memory(mode, 0, refuse) is plan


def test_plans_go_down_to_the_smallest():
    plan, seen = HIGH, [HIGH]
    while (plan := next_smaller(plan)) is not None:
        seen.append(plan)
    assert seen == list(PLANS)
    assert PLANS[-1] is MIN


def test_free_memory_is_of_this_machine():
    """Caught: kilobytes taken for bytes."""
    everything = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0.01 * everything < free_bytes(torch.device("cpu")) < everything


@pytest.mark.parametrize(("share", "free"), [(1.0, 66), (0.5, 46), (0.7, 66), (None, 66)])
def test_free_memory_of_a_process_with_a_limit(monkeypatch, share, free):
    """By hand: of 100, others have 30; this process has 10 in a cache, and tensors of 4 in it.

    Caught: a plan beyond torch.cuda.set_per_process_memory_fraction, the cache counted twice.
    """
    names = {"mem_get_info": (60, 100), "memory_reserved": 10, "memory_allocated": 4}
    for name, value in names.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    limit = "get_per_process_memory_fraction"
    if share is None:
        monkeypatch.delattr(torch.cuda, limit, raising=False)
    else:
        monkeypatch.setattr(torch.cuda, limit, lambda _: share, raising=False)
    assert free_bytes(torch.device("cuda")) == free


def test_a_copy_without_values(engine):
    """Caught: the model itself moved, types of integers changed."""
    network = engine.model.diffusion_model
    before = {key: value.data_ptr() for key, value in network.state_dict().items()}
    twin = meta_copy(network, torch.float16)
    assert {p.device.type for p in twin.parameters()} == {"meta"}
    assert {p.dtype for p in twin.parameters()} == {torch.float16}
    assert list(twin.state_dict()) == list(network.state_dict())
    assert {key: value.data_ptr() for key, value in network.state_dict().items()} == before


@pytest.mark.parametrize("optimized", [False, True])
def test_needs_of_a_model(engine, optimized):
    """Weights by counting parameters; every plan no larger than the one before it.

    Caught: a part left out, a type taken for another, the halves of guidance not told apart.
    """
    place = partial(torch.Tensor.to, device="meta", dtype=torch.bfloat16)
    plain = engine.model.diffusion_model
    autoencoder = engine.conditioner.embedders[3].encoder
    job = Job(3, (64, 64), 2, 3, torch.bfloat16, torch.float32)

    def network(_) -> nn.Module:
        return OptimizedUNet(plain, place) if optimized else meta_copy(plain, torch.bfloat16)

    encoders = [(autoencoder.encoder, torch.float32)]
    needs = count_needs(engine, job, encoders, network, optimized)
    numbers = sum(p.numel() for p in engine.first_stage_model.decoder.parameters())
    assert needs.weights["decoding"] == 4 * numbers
    assert needs.weights["encoding"] == 4 * sum(p.numel() for p in encoders[0][0].parameters())
    if not optimized:
        assert needs.weights["sampling"] == 2 * sum(p.numel() for p in plain.parameters())
    assert sum(needs.blocks) <= 1.1 * needs.weights["sampling"]
    assert len(needs.blocks) == len(plain.input_blocks) + 1 + len(plain.output_blocks) - optimized
    both, one = (network_peak(plain, network(HIGH), job, in_turn) for in_turn in (False, True))
    assert 0.45 < one / both < 0.6
    peaks = [needs.peak(plan) for plan in PLANS]
    assert peaks == sorted(peaks, reverse=True)
    assert needs.by_stage(HIGH)["sampling"] > 1.3 * needs.by_stage(MIN)["sampling"]


def test_a_step_holds_no_more_than_it_needs():
    """In maps of the full size, of one clip. Catches: a variable, or a caller's, that keeps a map
    which nobody reads again; skips and a feed-forward in pieces are most of what is left."""
    config = read_config(find_config("svd_xt"))["params"]["network_config"]
    with torch.device("meta"):
        plain = instantiate_from_config(config).eval()
    draw_blends(plain)
    place = partial(torch.Tensor.to, device="meta", dtype=torch.float16)
    network = OptimizedUNet(plain, place)
    network.split_feed_forwards(8)
    lay_out_for_accelerator(network)
    job = Job(25, (72, 128), 2, 14, torch.float16, torch.float16, "sizes")
    with kernels.use(job.form):
        peak = network_peak(plain, network, job, in_turn=True)
    assert peak / (25 * 72 * 128 * 320 * 2) == pytest.approx(11.1, abs=0.2)


@pytest.mark.slow
def test_needs_of_the_full_model():
    """svd_xt, 25 frames of 576x1024 in float16: figures known from counting its layers by hand.

    1,524.6 M parameters of the U-Net; about 7.7 GB of activations for a guided step; the temporal
    decoder takes somewhat over a gigabyte for a frame.
    """
    config = read_config(find_config("svd_xt"))
    config["params"]["ckpt_path"] = None
    with torch.device("meta"):
        engine = instantiate_from_config(config).eval()
    dtype = torch.float16
    job = Job(25, (72, 128), 2, 14, dtype, dtype)
    encoder = next(m for m in engine.conditioner.modules() if isinstance(m, Encoder))
    network = meta_copy(engine.model.diffusion_model, dtype)
    needs = count_needs(engine, job, [(encoder, dtype)], lambda _: network, False)
    assert needs.weights["sampling"] == pytest.approx(2 * 1524.6e6, rel=1e-3)
    assert len(blocks_of(network)) == 12 + 1 + 12
    assert needs.activations("sampling", HIGH) == pytest.approx(7.7e9, rel=0.1)
    assert needs.activations("decoding", HIGH) == pytest.approx(14 * 1.25e9, rel=0.1)
    assert needs.by_stage(LOW)["decoding"] < 6e9
    assert needs.by_stage(MIN)["decoding"] < 3e9


@pytest.mark.slow
def test_plans_of_the_full_model(monkeypatch):
    """The table of docs/performance.md: svd_xt, 25 frames of 576x1024, float16, on CUDA."""
    monkeypatch.setattr(kernels, "has_triton", lambda _: True)
    config = read_config(find_config("svd_xt"))
    config["params"]["ckpt_path"] = None
    with torch.device("meta"):
        engine = instantiate_from_config(config).eval()
    draw_blends(engine)
    options = SamplingOptions(device="cuda", dtype="float16", optimize="exact")
    needs = needs_of(engine, resolve(options, config, SPECS["svd_xt"], (576, 1024)))
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    for plan in PLANS:
        (row,) = re.findall(rf"^\| `{plan.name}` \|.*\| ([\d.]+) GB \|(.*)\|$", page, re.MULTILINE)
        assert float(row[0]) == pytest.approx(needs.peak(plan) / 1e9, abs=0.06)
        for told, stage in zip(row[1].split("|"), needs.by_stage(plan).values(), strict=True):
            assert float(told) == pytest.approx(stage / 1e9, abs=0.06)


@pytest.mark.slow
def test_what_the_page_counts_of_a_step(monkeypatch):
    """The other figures of docs/performance.md: 8-bit products, biases, activations."""
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    config = read_config(find_config("svd_xt"))["params"]["network_config"]
    with torch.device("meta"):
        plain = instantiate_from_config(config).eval()
    draw_blends(plain)
    network = OptimizedUNet(plain, partial(torch.Tensor.to, device="meta", dtype=torch.float16))
    lay_out_for_accelerator(network)
    job = Job(25, (72, 128), 2, 14, torch.float16, torch.float16, "sizes")
    late, products = [], []
    convolve, multiply = Convolution.product, EightBitLinear.forward

    def convolved(layer, x):
        out, bias = convolve(layer, x)
        late.append(2 * out.nbytes * (bias is not None))
        return out, bias

    def added(x, bias):  # at once, by the convolution itself
        late.append(-2 * x.nbytes * (bias is not None))
        return x

    def multiplied(layer, x):
        products.append(2 * x.numel() * len(layer.weight))
        return multiply(layer, x)

    monkeypatch.setattr(Convolution, "product", convolved)
    monkeypatch.setattr("sgm.inference.optimized.layers.plus", added)
    monkeypatch.setattr(EightBitLinear, "forward", multiplied)
    monkeypatch.setattr("sgm.inference.optimized.layers._LATE_BIAS", {"meta"})
    with kernels.use(job.form):
        peak = network_peak(plain, network, job, in_turn=False)
        use_eight_bits(network)
        biases = sum(late)
        network_peak(plain, network, job, in_turn=False)
    assert f"the next kernel adds it instead: {biases / 1e9:.0f} GB a step" in page
    assert f"{peak / 1e9:.1f} GB of activations for a guided step" in page
    assert f"e4m3: {sum(products) / 1e12:.0f} of the 150 TFLOP" in page
