"""What validation measures beside `sgm.data.metrics`: SSIM, and by networks LPIPS and FVD.

The networks' weights are the user's: nothing is fetched, and what is missing is named.
Shapes: n pictures, t frames, h height, w width, d features.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgm.data.metrics import Floats, Frames

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2

LPIPS_TRUNKS = {
    "vgg": "vgg16-397923af.pth",
    "alex": "alexnet-owt-7be5be79.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}
"""Files of torchvision's weights that LPIPS compares features of, in torch hub's folder."""

I3D_SIZE = 224
I3D_FRAMES = 10
"""Frames that I3D needs at least."""


def ssim(a: Frames, b: Frames) -> float:
    """Return the structural similarity of two pictures, 1 if equal.

    Wang et al., "Image quality assessment" (2004): a Gaussian window of 11 pixels and deviation
    1.5, K1 = 0.01 and K2 = 0.03, the mean over the channels and over the windows that lie inside.

    Args:
        a: (h, w, 3), 11 pixels or more along each edge.
        b: of the same shape.

    Raises:
        ValueError: the shapes differ or are too small.
    """
    if a.shape != b.shape or min(a.shape[:2]) < _WINDOW:
        raise ValueError(
            f"expected two pictures of one shape, {_WINDOW} pixels or more along each edge, got "
            f"{a.shape} and {b.shape}"
        )
    x, y = (torch.from_numpy(p.astype(np.float64)).movedim(-1, 0)[:, None] for p in (a, b))
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    structure = (2 * covariance + _C2) / (var_x + var_y + _C2)
    return float((luminance * structure).mean())


def _blur(x: Tensor) -> Tensor:
    """Weigh (n, 1, h, w) by the window, where it lies inside."""
    distance = torch.arange(_WINDOW, dtype=x.dtype) - _WINDOW // 2
    weights = (-(distance**2) / (2 * _SIGMA**2)).exp()
    weights /= weights.sum()
    return F.conv2d(F.conv2d(x, weights[None, None, :, None]), weights[None, None, None])


def perceptual_distance(net: str = "vgg") -> nn.Module:
    """Make LPIPS (Zhang et al., arXiv 1801.03924).

    It is called with two batches of pictures (n, 3, h, w) in [-1, 1] and gives (n, 1, 1, 1).

    Args:
        net: ``vgg``, ``alex`` or ``squeeze``.

    Raises:
        ValueError: the package or the weights are not installed; says how to get them.
    """
    if net not in LPIPS_TRUNKS:
        raise ValueError(f"lpips: expected one of {', '.join(LPIPS_TRUNKS)}, got {net!r}")
    try:
        import lpips  # type: ignore[import-not-found]
    except ModuleNotFoundError as exc:
        raise ValueError("lpips needs the package of this name: pip install lpips") from exc
    file = Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_TRUNKS[net]
    if not file.is_file():
        raise ValueError(
            f"lpips needs torchvision's weights at {file}: put them there, or leave lpips out"
        )
    made: nn.Module = lpips.LPIPS(net=net, verbose=False)
    return made.requires_grad_(False).eval()


class FrechetVideoDistance:
    """FVD (Unterthiner et al., arXiv 1812.01717) by an I3D network that the user points at.

    The figure depends on the number of clips: compare such of equal numbers alone.

    Args:
        weights: TorchScript file of I3D (Carreira & Zisserman, arXiv 1705.07750), called with
            clips (n, 3, t, 224, 224) in [-1, 1] and ``rescale=False, resize=False,
            return_features=True``, as ``i3d_torchscript.pt`` is; gives (n, d).
        device: where it computes.

    Raises:
        ValueError: there is no such file, or it cannot be used.
    """

    def __init__(self, weights: str | Path, device: torch.device | str = "cpu") -> None:
        if not Path(weights).is_file():
            raise ValueError(f"fvd: there is no I3D file {weights}: give another, or leave fvd out")
        self.device = torch.device(device)
        try:
            self.network: Any = torch.jit.load(str(weights), map_location=self.device).eval()
        except RuntimeError as exc:
            raise ValueError(f"fvd: {weights} is not a TorchScript file") from exc

    def __call__(self, made: Sequence[Frames], real: Sequence[Frames]) -> float:
        """Return the distance of two sets of clips (t, h, w, 3).

        Raises:
            ValueError: fewer than two clips, or clips of fewer than ten frames.
        """
        return frechet_distance(self.features(made), self.features(real))

    @torch.no_grad()
    def features(self, clips: Sequence[Frames]) -> Floats:
        """Return (n, d)."""
        if len(clips) < 2 or min(map(len, clips)) < I3D_FRAMES:
            raise ValueError(f"fvd: expected two clips or more, of {I3D_FRAMES} frames or more")
        rows = []
        for clip in clips:
            x = torch.from_numpy(clip).to(self.device).movedim(-1, 1).float() / 127.5 - 1
            size = (I3D_SIZE, I3D_SIZE)
            x = F.interpolate(x, size, mode="bilinear", align_corners=False).movedim(0, 1)[None]
            rows.append(self.network(x, rescale=False, resize=False, return_features=True))
        found: Floats = torch.cat(rows).double().cpu().numpy()
        return found


def frechet_distance(a: Floats, b: Floats) -> float:
    """Return the squared Fréchet distance of two sets of features, each taken for a Gaussian.

    ``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))`` (Dowson & Landau 1982).

    Args:
        a: (n, d).
        b: (m, d).
    """
    mean = np.square(a.mean(axis=0) - b.mean(axis=0)).sum()
    first, second = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    # The trace of the root of C_a C_b is that of the symmetric C_a^(1/2) C_b C_a^(1/2).
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    return max(0.0, float(mean + np.trace(first) + np.trace(second) - 2 * cross))
