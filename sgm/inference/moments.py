"""Group normalisation (arXiv 1803.08494) of values that come part by part.

Shapes: t frames, c channels, g groups of channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Moments:
    """Mean and variance of every frame and group, of values that come part by part.

    Chan, Golub and LeVeque, "Algorithms for computing the sample variance" (1983), in float32 at
    least, so that neither small parts nor a large mean cost accuracy.

    Args:
        like: (t, ...), on the device where values will be.
        norm: the norm that asks for them.
    """

    def __init__(self, like: Tensor, norm: nn.GroupNorm) -> None:
        wide = torch.promote_types(like.dtype, torch.float32)
        self.norm = norm
        self.mean = torch.zeros(len(like), norm.num_groups, dtype=wide, device=like.device)
        self.deviations = torch.zeros_like(self.mean)
        self.count = torch.zeros_like(self.mean[:, :1])

    def add(self, frames: slice, x: Tensor) -> None:
        """Take further values (t', c, h, w) of these frames in."""
        values = x.to(self.mean.dtype).unflatten(1, (self.norm.num_groups, -1)).flatten(2)
        n = values.shape[-1]
        variance, mean = torch.var_mean(values, -1, correction=0)
        count, shift = self.count[frames] + n, mean - self.mean[frames]
        self.deviations[frames] += n * (variance + shift**2 * self.count[frames] / count)
        self.mean[frames] += shift * n / count
        self.count[frames] = count

    def normalise(self, frames: slice, x: Tensor, clip: bool) -> Tensor:
        """Normalise values (t', c, h, w) of these frames.

        With given statistics, that is a batch norm over ``t' c`` channels in evaluation mode.

        Args:
            frames: which of the t they are.
            x: the values.
            clip: with the statistics of all frames together, not of each.
        """
        mean, variance = self._together() if clip else (self.mean, self.deviations / self.count)
        (t, c), norm = x.shape[:2], self.norm
        per_channel = c // norm.num_groups
        out = F.batch_norm(
            x.reshape(1, t * c, *x.shape[2:]),
            mean[frames].repeat_interleave(per_channel, 1).flatten(),
            variance[frames].repeat_interleave(per_channel, 1).flatten(),
            norm.weight.repeat(t).to(mean),
            norm.bias.repeat(t).to(mean),
            eps=norm.eps,
        )
        return out.view(x.shape)

    def _together(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of all frames, for each of them; all have equally many values."""
        mean = self.mean.mean(0, keepdim=True)
        variance = (self.deviations / self.count + (self.mean - mean) ** 2).mean(0, keepdim=True)
        return mean.expand_as(self.mean), variance.expand_as(self.mean)
