"""The adversary of the temporal decoder, and how the two losses are weighed.

Align Your Latents (arXiv 2304.08818), section 3.1.1: a video decoder is fine-tuned against a
discriminator that sees patches of space and time. Shapes: b clips, t frames, h height, w width.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS, LARGEST = 1e-4, 1e4


class PatchDiscriminator(nn.Module):
    """Says of each patch of a clip whether it is real: 3-D convolutions, halving the size.

    Isola et al. (arXiv 1611.07004), section 3.2.2, with time, and with normalisation that does not
    depend on the batch.

    Args:
        channels: of the first layer; doubled by each, up to eight times.
        layers: that halve the size.
    """

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        widths = [channels * min(2**i, 8) for i in range(layers)]
        parts: list[nn.Module] = [_halving(3, channels), nn.LeakyReLU(0.2)]
        for c_in, c_out in pairwise(widths):
            groups = 32 if c_out % 32 == 0 else 1
            parts += [_halving(c_in, c_out), nn.GroupNorm(groups, c_out), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*parts, nn.Conv3d(widths[-1], 1, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, 3, h, w) in [-1, 1] -> (b, 1, t, h / 2^layers, w / 2^layers); large: real."""
        return self.layers(x.transpose(1, 2))


def _halving(c_in: int, c_out: int) -> nn.Conv3d:
    return nn.Conv3d(c_in, c_out, (3, 4, 4), stride=(1, 2, 2), padding=1)


def hinge_loss(real: Tensor, made: Tensor) -> Tensor:
    """Return the discriminator's loss (Lim & Ye, arXiv 1705.02894); 0 beyond a margin of 1."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + made).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last: Tensor) -> Tensor:
    """Return what brings the adversary's gradient to the size of the reconstruction's.

    ``|grad rec| / (|grad adv| + eps)`` at the last layer, at most 10^4 (Esser et al., "Taming
    transformers", arXiv 2012.09841, equation 7).

    Args:
        reconstruction: a loss.
        adversarial: another loss.
        last: weights of the last layer that both depend on.
    """
    sizes = [
        torch.autograd.grad(loss, last, retain_graph=True)[0].norm()
        for loss in (reconstruction, adversarial)
    ]
    return (sizes[0] / (sizes[1] + EPS)).clamp(max=LARGEST).detach()
