"""Layers on channels-last activations, with weights in the form that the device multiplies fastest.

Shapes: n = b t rows, the frames of the clips one after the other; h height, w width, s = h w
positions; c channels. Maps are contiguous (n, h, w, c), so that tokens (n, s, c) and a clip's time
axis are views of them. Weights come through a *place* function, which brings a stored tensor to the
device and type of the optimised network; nothing here changes a stored tensor.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.func import functional_call

from sgm import kernels

Place = Callable[[Tensor], Tensor]
# Tensors for a function that empties the list, so that no caller's variable keeps them in memory.
Held = list[Tensor]
Pair = tuple[int, int]

# Devices whose convolutions add their bias in a pass of its own over the result.
_LATE_BIAS = frozenset(("cuda",))
_ONEDNN_DTYPES = (torch.float32, torch.bfloat16)
_onednn: Any = torch.ops.mkldnn


class Linear(nn.Module):
    """A linear layer.

    On a CPU the weight is laid out for oneDNN in the first call, and no more in the others.

    Args:
        weight: (c_out, c_in), placed.
        bias: (c_out,) or None, placed.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.packed: bool | None = None
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    @classmethod
    def of(cls, plain: nn.Module, place: Place) -> "Linear":
        """The same product as a linear layer or a 1x1 convolution."""
        return cls.joined([plain], place)

    @classmethod
    def joined(cls, layers: Sequence[nn.Module], place: Place) -> "Linear":
        """Layers of the same input as one product, their outputs one after the other."""
        weights = [place(cast(Tensor, layer.weight)).flatten(1) for layer in layers]
        biases = [place(cast(Tensor, layer.bias)) for layer in layers if layer.bias is not None]
        return cls(_cat(weights), _cat(biases) if biases else None)

    def lay_out(self, for_cpu: bool) -> None:
        """Lay the weight out as the device that will compute likes it."""
        self.packed = for_cpu and _packs(self.weight)
        if self.packed:
            self.weight = _onednn._reorder_linear_weight(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., c_in) -> (..., c_out)."""
        if self.packed is None:
            self.lay_out(x.device.type == "cpu")
        if self.packed:
            return _onednn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


class Convolution(nn.Module):
    """A convolution over height and width of (n, h, w, c).

    On a CPU the weight is laid out for oneDNN in the first call, and no more in the others.

    Args:
        weight: (c_out, c_in, k_h, k_w), placed.
        bias: (c_out,) or None, placed.
        stride: of both axes.
        padding: zeros before and after height and width.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: Pair = (1, 1)
    ) -> None:
        super().__init__()
        self.packed: bool | None = None
        self.stride, self.padding = (stride, stride), padding
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    @classmethod
    def of(cls, plain: nn.Conv2d, place: Place) -> "Convolution":
        """The same convolution."""
        bias = None if plain.bias is None else place(plain.bias)
        padding = cast(Pair, plain.padding)
        return cls(place(plain.weight), bias, plain.stride[0], padding)

    def lay_out(self, for_cpu: bool, size: Sequence[int] = ()) -> None:
        """Lay the weight out as the device that will compute likes it.

        Args:
            for_cpu: whether that is a CPU.
            size: (n, c_in, h, w) of the input, which a CPU's layout depends on.
        """
        self.packed = for_cpu and _packs(self.weight)
        self.weight = (
            _onednn._reorder_convolution_weight(self.weight, *self._geometry(), list(size))
            if self.packed
            else self.weight.contiguous(memory_format=torch.channels_last)
        )

    def _geometry(self) -> tuple[Pair, Pair, Pair, int]:
        """Padding, stride, dilation and groups."""
        return self.padding, self.stride, (1, 1), 1

    def forward(self, x: Tensor) -> Tensor:
        """(n, h, w, c_in) -> (n, h', w', c_out)."""
        return plus(*self.product(x))

    def product(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The result, and the bias where it is still to be added: the next kernel has it for free.

        Args:
            x: (n, h, w, c_in).

        Returns:
            (n, h', w', c_out), and (c_out,) or None.
        """
        image = x.permute(0, 3, 1, 2)
        late = x.device.type in _LATE_BIAS
        bias = None if late else self.bias
        if self.packed is None:
            self.lay_out(x.device.type == "cpu", image.shape)
        if self.packed:
            out = _onednn._convolution_pointwise(
                image, self.weight, bias, *self._geometry(), "none", [], ""
            )
        else:
            out = F.conv2d(image, self.weight, bias, self.stride, self.padding)
        return out.permute(0, 2, 3, 1).contiguous(), self.bias if late else None


class TemporalConvolution(nn.Module):
    """A convolution over the frames of a clip.

    The kernel of published models, (k, 1, 1), is a 2-D one over (t, s): a view of channels-last
    maps. Others are computed as they are.

    Args:
        plain: the layer.
        place: see the module.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, plain: nn.Conv3d, place: Place) -> None:
        super().__init__()
        weight, bias = place(plain.weight), None if plain.bias is None else place(plain.bias)
        self.padding = tuple(size // 2 for size in weight.shape[2:])
        self.thin = weight.shape[3:] == (1, 1)
        if self.thin:
            self.over_time = Convolution(weight[..., 0], bias, padding=(self.padding[0], 0))
        else:
            self.register_buffer("weight", weight)
            self.register_buffer("bias", bias)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """(n, h, w, c_in) -> (n, h, w, c_out)."""
        return plus(*self.product(x, frames))

    def product(self, x: Tensor, frames: int) -> tuple[Tensor, Tensor | None]:
        """The result, and a bias that is still to be added; see :meth:`Convolution.product`."""
        if self.thin:
            clips = rearrange(x, "(b t) h w c -> b t (h w) c", t=frames)
            out, bias = self.over_time.product(clips)
            return out.view(*x.shape[:3], -1), bias
        clips = rearrange(x, "(b t) h w c -> b c t h w", t=frames)
        out = F.conv3d(clips, self.weight, self.bias, padding=self.padding)
        return rearrange(out, "b c t h w -> (b t) h w c").contiguous(), None


class UpsampleConvolution(nn.Module):
    """Nearest-neighbour upsampling by 2 and a 3x3 convolution, as one 2x2 convolution of the input.

    A pixel of the large map sees two by two pixels of the small one: of the three rows under the
    kernel two are the same input row, and their weights add up. Which two depends on whether the
    row is even or odd, likewise for columns: four kernels, stacked as output channels, with 5/9 of
    the multiplications gone.

    Args:
        plain: the 3x3 convolution.
        place: see the module.
    """

    def __init__(self, plain: nn.Conv2d, place: Place) -> None:
        super().__init__()
        weight = place(plain.weight)
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        # Rows of the small map, previous and next: an even row sees (w0, w1 + w2), an odd one
        # (w0 + w1, w2).
        fold = wide.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
        folded = torch.einsum("pik,qjl,ockl->pqocij", fold, fold, wide).to(weight.dtype)
        bias = None if plain.bias is None else place(plain.bias).repeat(4)
        self.phases = Convolution(folded.flatten(0, 2), bias)

    def forward(self, x: Tensor) -> Tensor:
        """(n, h, w, c_in) -> (n, 2h, 2w, c_out)."""
        n, h, w, _ = x.shape
        product, bias = self.phases.product(x)
        seen = rearrange(product, "n h w (p q c) -> n h w p q c", p=2, q=2)
        out = seen.new_empty(n, h, 2, w, 2, seen.shape[-1])
        for p in (0, 1):
            for q in (0, 1):
                phase, target = seen[:, p : h + p, q : w + q, p, q], out[:, :, p, :, q]
                if bias is None:
                    target.copy_(phase)
                else:
                    torch.add(phase, bias[: phase.shape[-1]], out=target)
        return out.view(n, 2 * h, 2 * w, -1)


class GroupNorm(nn.Module):
    """GroupNorm of a map, with an addition before it and SiLU after it.

    Args:
        plain: the layer.
        place: see the module.
        silu: whether SiLU follows.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, plain: nn.GroupNorm, place: Place, silu: bool = True) -> None:
        super().__init__()
        self.groups, self.eps, self.silu = plain.num_groups, plain.eps, silu
        self.register_buffer("weight", place(plain.weight))
        self.register_buffer("bias", place(plain.bias))

    def forward(self, x: Tensor, shift: Tensor | None = None, frames: int = 1) -> Tensor:
        """(n, h, w, c) -> (n, h, w, c); see :func:`sgm.kernels.group_norm`."""
        out = kernels.group_norm(
            x.flatten(1, 2),
            self.weight,
            self.bias,
            self.groups,
            self.eps,
            shift=shift,
            frames=frames,
            silu=self.silu,
        )
        return out.view_as(x)


def plus(x: Tensor, bias: Tensor | None) -> Tensor:
    """``x + bias``, in place, for (..., c) and (c,) or None."""
    return x if bias is None else x.add_(bias)


def lay_out_for_accelerator(network: nn.Module) -> None:
    """Lay the weights of a network that is on the host out for another device."""
    for module in network.modules():
        if isinstance(module, Linear | Convolution):
            module.lay_out(for_cpu=False)


def stored(plain: nn.Module, place: Place, x: Tensor) -> Tensor:
    """Apply a stored layer that is needed once per run; its weights are placed for the moment."""
    return functional_call(plain, {name: place(p) for name, p in plain.named_parameters()}, (x,))


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate; a single tensor stays what it is, perhaps a view of a file."""
    return torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]


def _packs(weight: Tensor) -> bool:
    """Whether oneDNN has its own layout for a weight. These operations are not in PyTorch's
    documented interface; where they are missing, the plain ones serve."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in _ONEDNN_DTYPES
        and torch.backends.mkldnn.is_available()
        and hasattr(_onednn, "_linear_pointwise")
        and hasattr(_onednn, "_convolution_pointwise")
    )
