"""Products of 8-bit floats: half the bytes, and twice the rate on Ada and Hopper GPUs.

An approximation: e4m3 (arXiv 2209.05433) has four significant bits. It is taken behind LayerNorms:
for query, key and value, and for both products of a feed-forward, 40 % of the arithmetic.
Of c values with mean 0 and variance 1, the squares add up to c. So what a norm gives is bounded by
its weights, and what a product makes of that by the norm of its rows (Cauchy and Schwarz): all
scales are known when a model is loaded, no 8-bit number overflows, and no tensor is read once more
to find its largest value. Kernels write 8 bits as they would write 16.
"""

import torch
from torch import Tensor, nn

from sgm.inference.optimized.layers import Linear
from sgm.inference.optimized.transformer import (
    Attention,
    FeedForward,
    LayerNorm,
    SpatialBlock,
    TemporalBlock,
)

E4M3 = torch.float8_e4m3fn
_LARGEST = torch.finfo(E4M3).max
# A factor. Inputs and weights rounded by 2^-4 at most make 1.27 for value and gate; more is room.
_ROUNDING = 1.5
_LEAST = 1e-6  # of a bound, where a row is zero
_MULTIPLE = 16  # of the channels, which a GPU asks for
_CAPABILITY = (8, 9)  # Ada; Hopper is 9.0


def require_eight_bits(device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a device without products of 8-bit floats. A CPU has them, slowly: to try them out.

    Raises:
        ValueError: with what would do.
    """
    if device.type != "cpu" and (
        device.type != "cuda" or torch.cuda.get_device_capability(device) < _CAPABILITY
    ):
        raise ValueError(
            f"--optimize fp8 needs an Ada or Hopper GPU (compute capability 8.9), got {device}: "
            "take exact or fast"
        )
    if device.type == "cuda" and dtype == torch.float32:
        raise ValueError("--optimize fp8 needs --dtype float16 or bfloat16 on a GPU, got float32")
    try:
        _try_out(device, dtype)
    except RuntimeError as error:  # also NotImplementedError
        raise ValueError(
            f"--optimize fp8: PyTorch {torch.__version__} does not multiply e4m3 on {device}: "
            "take exact or fast, or a newer PyTorch"
        ) from error


def use_eight_bits(network: nn.Module) -> None:
    """Have the transformers of an optimised U-Net multiply in e4m3 what LayerNorms lead to."""
    for block in network.modules():
        match block:
            case SpatialBlock():
                _attention(block.norm1, block.attention)
            case TemporalBlock():
                _feed_forward(block.norm_in, block.feed_forward_in)
                _attention(block.norm1, block.attention)
            case _:
                continue
        _feed_forward(block.norm3, block.feed_forward)


class EightBitLinear(nn.Module):
    """A linear layer of an input in e4m3.

    Args:
        weight: (c_out, c_in), which is rounded to e4m3 with one scale.
        bias: (c_out,) or None.
        scale: what the input was multiplied by.
        dtype: of the result.
    """

    weight: Tensor
    bias: Tensor | None
    scales: Tensor

    def __init__(
        self, weight: Tensor, bias: Tensor | None, scale: Tensor, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.dtype = dtype
        fill = _LARGEST / weight.float().abs().amax().clamp(min=_LEAST)
        self.register_buffer("weight", (weight * fill).to(E4M3))
        self.register_buffer("bias", bias)
        self.register_buffer("scales", torch.stack([1 / scale, 1 / fill]).float())

    def forward(self, x: Tensor) -> Tensor:
        """(..., c_in) in e4m3 -> (..., c_out)."""
        out = torch._scaled_mm(
            x.flatten(0, -2),
            self.weight.t(),
            scale_a=self.scales[0],
            scale_b=self.scales[1],
            bias=self.bias,
            out_dtype=self.dtype,
            use_fast_accum=True,
        )
        return out.view(*x.shape[:-1], -1)


def _try_out(device: torch.device, dtype: torch.dtype) -> None:
    one = torch.ones((), device=device)
    weight = torch.zeros(_MULTIPLE, _MULTIPLE, device=device)
    bias = torch.zeros(_MULTIPLE, device=device, dtype=dtype)
    EightBitLinear(weight, bias, one, dtype)(weight.to(E4M3))


def _attention(norm: LayerNorm, attention: Attention) -> None:
    if _fit(attention.qkv):
        attention.qkv = _behind(norm, attention.qkv)


def _feed_forward(norm: LayerNorm, layer: FeedForward) -> None:
    if not _fit(layer.widen, layer.narrow):
        return
    value, gate = _bounds(norm, layer.widen).chunk(2)  # and |gelu(x)| <= |x|
    scale = _LARGEST / _ROUNDING / (value * gate)
    narrow = layer.narrow
    weight, one = narrow.weight.float() / scale, scale.new_ones(())
    layer.widen = _behind(norm, layer.widen)
    layer.narrow = EightBitLinear(weight, narrow.bias, one, narrow.weight.dtype)
    layer.scale, layer.inside = scale, E4M3


def _behind(norm: LayerNorm, linear: Linear) -> EightBitLinear:
    """The product with what a norm gives; the norm now writes e4m3, with a scale that fills it."""
    weight, bias = norm.weight.float(), norm.bias.float()
    bound = weight.abs() * (len(weight) - 1) ** 0.5 + bias.abs()  # all of one value, none elsewhere
    scale = _LARGEST / bound.amax().clamp(min=_LEAST)
    norm.weight, norm.bias = ((each * scale).to(norm.weight.dtype) for each in (weight, bias))
    norm.dtype = E4M3
    return EightBitLinear(linear.weight, linear.bias, scale, linear.weight.dtype)


def _bounds(norm: LayerNorm, linear: Linear) -> Tensor:
    """(c_out,): what no channel behind a norm and a linear layer exceeds."""
    weight = linear.weight.float()
    centre = weight @ norm.bias.float()
    centre = centre if linear.bias is None else centre + linear.bias.float()
    spread = (weight * norm.weight.float()).norm(dim=1) * weight.shape[1] ** 0.5
    return (spread + centre.abs()).clamp(min=_LEAST)


def _fit(*layers: Linear) -> bool:
    return all(side % _MULTIPLE == 0 for layer in layers for side in layer.weight.shape)
