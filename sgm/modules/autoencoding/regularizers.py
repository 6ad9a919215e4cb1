"""What stands between encoder and decoder: the latent distribution."""

import torch
from torch import Tensor, nn


class DiagonalGaussianRegularizer(nn.Module):
    """A diagonal Gaussian over latents, with the divergence from a standard normal as its loss.

    Auto-Encoding Variational Bayes (arXiv 1312.6114), appendix B.

    Args:
        sample: draw from the distribution, else give its mode.
    """

    def __init__(self, sample: bool = True) -> None:
        super().__init__()
        self.sample = sample

    def forward(
        self, moments: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(n, 2 z, h, w) -> latents (n, z, h, w) and ``{"kl_loss": mean over n}``, in nats.

        The log-variance is held within [-30, 20].
        """
        mean, log_var = moments.chunk(2, dim=1)
        log_var = log_var.clamp(-30.0, 20.0)
        kl = 0.5 * (mean.square() + log_var.exp() - 1.0 - log_var).sum(dim=(1, 2, 3)).mean()
        if not self.sample:
            return mean, {"kl_loss": kl}
        device = mean.device if generator is None else generator.device
        noise = torch.randn(mean.shape, generator=generator, device=device).to(mean)
        return mean + (0.5 * log_var).exp() * noise, {"kl_loss": kl}
