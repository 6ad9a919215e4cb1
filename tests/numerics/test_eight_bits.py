"""``--optimize fp8``: products of e4m3 against the products that they round."""

import pytest
import torch
from torch import nn

from sgm.inference import SamplingOptions, VideoPipeline
from sgm.inference.optimized import OptimizedNetwork
from sgm.inference.optimized.eight_bits import (
    E4M3,
    EightBitLinear,
    require_eight_bits,
    use_eight_bits,
)
from sgm.inference.optimized.transformer import FeedForward, LayerNorm, SpatialBlock
from sgm.inference.specs import ROOT
from sgm.modules.attention import BasicTransformerBlock
from tests.numerics.test_optimized import T, call, conditioning, wrapped
from tests.recorded import filled, noise, relative_error

C = 64
PICTURE = ROOT / "assets" / "sample.jpg"


def as_it_is(x):
    return x.detach()


def single(x):
    return x.detach().float()


def block(loud=1.0):
    """A block, plain and for sampling; ``loud``: one channel in eight of its norms is larger."""
    plain = filled(BasicTransformerBlock(C, 4, 16, context_dim=C)).requires_grad_(False)
    for norm in (plain.norm1, plain.norm3):
        norm.weight[::8] *= loud
        norm.bias[::8] *= loud
    return plain, SpatialBlock(plain, as_it_is)


def test_a_product_of_8_bits_is_that_of_the_rounded_numbers():
    """Catches: a scale the wrong way round, left out, or taken for that of the other side."""
    x, weight, bias = 3 * noise("x", 5, 7, C), noise("w", 32, C) / 8, noise("bias", 32)
    scale = torch.tensor(20.0)
    layer = EightBitLinear(weight, bias, scale, torch.float32)
    rounded = (x * scale).to(E4M3)
    fill = 448 / weight.abs().max()
    expected = rounded.double() / 20 @ ((weight * fill).to(E4M3).double() / fill).t() + bias
    assert relative_error(layer(rounded), expected) < 1e-6
    assert relative_error(expected.float(), x @ weight.t() + bias) < 0.05


@pytest.mark.parametrize("loud", [1.0, 100.0])
def test_no_input_goes_beyond_the_range(loud):
    """One position that has all of the variance, or lies along a row of a matrix, is the worst that
    a norm and a feed-forward can meet. Catches: a bound that is none, or that a bias exceeds."""
    plain, ours = block(loud)
    norm, layer = plain.norm3, plain.ff.net[0].proj
    use_eight_bits(nn.ModuleList([ours]))
    peaks = 1e3 * torch.eye(C)
    along = 10 * (layer.weight * norm.weight)
    x = torch.cat([peaks, -peaks, along, -along])[None]
    for written in (ours.norm1, ours.norm3):
        values = written(x)[1].float()
        assert values.isfinite().all()
        assert 300 < values.abs().max() <= 448
    inside = ours.feed_forward
    assert inside(ours.norm3(x)[1]).isfinite().all()
    value, gate = layer(norm(x)).chunk(2, -1)
    hidden = value * nn.functional.gelu(gate) * inside.scale
    assert 1 < hidden.abs().max() < 448


@pytest.mark.parametrize("loud", [1.0, 100.0])
def test_a_feed_forward_is_close(loud):
    """A product of rounded numbers is off by 4 %. Catches: the inside in the wrong scale, or
    flushed to zero where weights differ in size."""
    plain, ours = block(loud)
    x = noise("tokens", 2, 30, C)
    use_eight_bits(nn.ModuleList([ours]))
    out = ours.feed_forward(ours.norm3(x)[1])
    assert 1e-3 < relative_error(out, plain.ff(plain.norm3(x))) < 0.1


def test_a_block_is_close():
    """Catches: a norm whose reader is another."""
    plain, ours = block()
    x, cross = noise("tokens", 2, 30, C), torch.zeros(2, C)

    def branch(block):
        total, delta = block([x], cross)
        return total + delta - x

    use_eight_bits(nn.ModuleList([ours]))
    for layer in (ours.attention.qkv, ours.feed_forward.widen, ours.feed_forward.narrow):
        assert isinstance(layer, EightBitLinear)
    assert 1e-3 < relative_error(branch(ours), branch(SpatialBlock(plain, as_it_is))) < 0.1


def test_odd_widths_stay_as_they_are():
    """A GPU multiplies e4m3 in multiples of 16."""
    plain = filled(BasicTransformerBlock(24, 3, 8, context_dim=24)).requires_grad_(False)
    ours = SpatialBlock(plain, as_it_is)
    x, cross = noise("narrow", 2, 5, 24), torch.zeros(2, 24)
    expected = SpatialBlock(plain, as_it_is)([x], cross)
    use_eight_bits(nn.ModuleList([ours]))
    assert all(map(torch.equal, ours([x], cross), expected))


def test_rows_of_zeros():
    """Catches: a division by a bound of zero."""
    plain, _ = block()
    for part in (plain.norm3.bias, plain.ff.net[0].proj.bias, plain.ff.net[0].proj.weight[:9]):
        part.zero_()
    ours = SpatialBlock(plain, as_it_is)
    use_eight_bits(nn.ModuleList([ours]))
    assert all(out.isfinite().all() for out in ours([noise("x", 1, 9, C)], torch.zeros(1, C)))


def test_the_whole_network():
    """Catches: a temporal block that is left out, a stored weight that is changed."""
    plain, c = wrapped().float(), {key: value.float() for key, value in conditioning().items()}
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    expected = call(OptimizedNetwork(plain, single), c)
    network = OptimizedNetwork(plain, single)
    use_eight_bits(network.unet)
    kinds = [type(module) for module in network.unet.modules()]
    assert kinds.count(EightBitLinear) == kinds.count(LayerNorm) + kinds.count(FeedForward) > 0
    assert 1e-3 < relative_error(call(network, c), expected) < 0.15
    assert all(torch.equal(before[key], value) for key, value in plain.state_dict().items())


@pytest.mark.parametrize("memory", ["high", "min"])
def test_a_pipeline_in_8_bits_is_close(memory):
    """Catches: a level that the pipeline does not apply, or not under a memory plan."""
    options = SamplingOptions(num_steps=4, num_frames=T, dtype="float32", output="tensor")
    exact, fp8 = (
        VideoPipeline.from_spec("svd_tiny", device="cpu", dtype="float32", **how)(PICTURE, options)
        for how in ({}, {"optimize": "fp8", "memory": memory})
    )
    error = (exact - fp8).square().mean()
    assert 50 < -10 * error.log10() < 80


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "message"),
    [
        ("mps", None, torch.float16, "needs an Ada or Hopper GPU .* got mps: take exact or fast"),
        ("cuda", (8, 6), torch.float16, "needs an Ada or Hopper GPU .* got cuda"),
        ("cuda", (9, 0), torch.float32, "needs --dtype float16 or bfloat16 on a GPU, got float32"),
    ],
)
def test_devices_without_such_products_are_refused(monkeypatch, device, capability, dtype, message):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    with pytest.raises(ValueError, match=message):
        require_eight_bits(torch.device(device), dtype)


def test_a_pytorch_without_such_products_is_refused(monkeypatch):
    require_eight_bits(torch.device("cpu"), torch.float32)

    def refuse(*_, **__):
        raise NotImplementedError("no such kernel")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    with pytest.raises(ValueError, match="does not multiply e4m3 on cpu: take exact or fast"):
        require_eight_bits(torch.device("cpu"), torch.float32)
