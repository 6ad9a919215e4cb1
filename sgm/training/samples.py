"""Videos of fixed pictures while training, made and measured as users will make them.

Shapes: t frames, h height, w width.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from sgm.config import build
from sgm.data.evaluation import Row, by_bucket, evaluate, mean, rank_correlations
from sgm.data.metrics import Frames
from sgm.data.motion import bucket_to_flow
from sgm.inference.levels import DEFAULT_LEVEL
from sgm.inference.options import SamplingOptions
from sgm.inference.pictures import fit_picture, load_picture
from sgm.inference.pipeline import VideoPipeline
from sgm.inference.results import to_frames
from sgm.inference.settings import ModelFiles, resolve
from sgm.inference.specs import get_spec
from sgm.inference.videos import Video
from sgm.models.diffusion import DiffusionEngine
from sgm.modules.ema import gathered
from sgm.training.export import weights_of, with_adapters_merged
from sgm.training.metrics import FrechetVideoDistance, perceptual_distance, ssim
from sgm.training.module import TrainingModule
from sgm.training.reporting import show_video
from sgm.training.validation import Every


class Videos(Every):
    """Samples pictures to videos by the averaged weights; writes and shows them, and measures.

    Measured are the first frame against the picture (PSNR, SSIM, LPIPS where asked for) and the
    motion achieved over the motion asked for; with ``fvd``, the distance to real clips.

    Args:
        model: the ``model`` section of the recipe: ``${model}``.
        version: named model whose defaults count, such as ``svd_xt``.
        pictures: files of fixed pictures.
        steps: between two measurements.
        buckets: motion buckets that each picture is sampled with.
        options: sampling options by name, see `SamplingOptions`.
        lpips: ``vgg``, ``alex`` or ``squeeze``, if that is installed.
        fvd: I3D file, see `FrechetVideoDistance`.
        dataset: config of the real clips that ``fvd`` compares with.
        clips: how many of them.

    Raises:
        ValueError: a picture, an option, a package or a file is missing or wrong.
    """

    def __init__(
        self,
        model: dict[str, Any],
        version: str,
        pictures: Sequence[str],
        steps: int = 500,
        buckets: Sequence[int] = (127,),
        options: Mapping[str, Any] | None = None,
        lpips: str | None = None,
        fvd: str | None = None,
        dataset: Mapping[str, Any] | None = None,
        clips: int = 16,
    ) -> None:
        super().__init__("samples", steps)
        spec = get_spec(version)
        self.files = ModelFiles(spec, Path(f"{version}.yaml"), model, Path("training"))
        asked = SamplingOptions.from_dict(options or {})
        self.settings = resolve(asked, model, spec, (spec.height, spec.width))
        height, width = self.settings.size
        # Height and width by the same names for all, whatever a picture's proportions.
        self.options = asked.replace(height=height, width=width)
        self.pictures = {Path(name).stem: self._fitted(name) for name in pictures}
        self.buckets = tuple(buckets)
        self.perceptual = perceptual_distance(lpips) if lpips else None
        if (fvd is None) != (dataset is None):
            raise ValueError("expected both of fvd and dataset, or neither")
        self.fvd = FrechetVideoDistance(fvd) if fvd else None
        self.dataset = build(dataset, "dataset") if dataset else None
        self.clips = clips

    def _fitted(self, name: str) -> Frames:
        height, width = self.settings.size
        return to_frames(fit_picture(load_picture(name), height, width, self.options.fit))

    def measure(self, trainer: pl.Trainer, module: TrainingModule) -> dict[str, float]:
        """Sample on the first process, from the weights of all."""
        weights = averaged_weights(module)
        if not trainer.is_global_zero:
            return {}
        pipeline = VideoPipeline(
            _engine_of(self.files.config, module.engine, weights),
            self.files,
            module.device,
            getattr(torch, self.options.dtype) if self.options.dtype else None,
            self.options.optimize or DEFAULT_LEVEL,
        )
        shown = list(self._shown(trainer, pipeline))
        return self._numbers(shown) | self._distance(pipeline)

    def _shown(self, trainer: pl.Trainer, pipeline: VideoPipeline) -> Iterator[tuple[Row, Frames]]:
        """Sample every picture with every bucket; write and show each as it comes."""
        folder = Path(trainer.default_root_dir) / "samples" / f"step_{trainer.global_step:07d}"

        def generate(picture: Frames, bucket: int, number: int) -> Frames:
            options = self.options.replace(motion_bucket_id=bucket, seed=self.options.seed + number)
            frames: Frames = pipeline(picture, options).frames
            return frames

        for row, clip in evaluate(generate, self.pictures, self.buckets):
            name = f"{row.photo}_bucket_{row.bucket}"
            video = Video(clip, self.options.fps)
            show_video(trainer, f"samples/{name}", video, video.save(folder / f"{name}.mp4"))
            yield row, clip

    def _numbers(self, shown: Sequence[tuple[Row, Frames]]) -> dict[str, float]:
        """The means over all videos, and the motion over that asked for by bucket."""
        rows = [row for row, _ in shown]
        pairs = [(clip[0], self.pictures[row.photo]) for row, clip in shown]
        numbers = {
            "first frame psnr": mean(rows, "psnr"),
            "first frame ssim": fmean(ssim(a, b) for a, b in pairs),
        }
        side = min(self.settings.size)
        for bucket, flow in by_bucket(rows, "flow").items():
            numbers[f"motion over asked, bucket {bucket}"] = flow / bucket_to_flow(bucket, side)
        if len(self.buckets) > 1:
            numbers["motion rank correlation"] = fmean(rank_correlations(rows).values())
        if self.perceptual is not None:
            a, b = (torch.stack([_to_tensor(p) for p in side]) for side in zip(*pairs, strict=True))
            with torch.no_grad():
                numbers["first frame lpips"] = float(self.perceptual(a, b).mean())
        return numbers

    def _distance(self, pipeline: VideoPipeline) -> dict[str, float]:
        """FVD to the real clips, each sampled from its first frame and with its numbers."""
        if self.fvd is None or self.dataset is None:
            return {}
        made, real = [], []
        for number in range(min(self.clips, len(self.dataset))):
            item = self.dataset[number]
            if "frames" not in item:
                raise ValueError("fvd: the dataset's clips have no frames, only latents")
            clip = to_frames(item["frames"])
            options = self.options.replace(
                seed=self.options.seed + number,
                num_frames=len(clip),
                height=clip.shape[1],
                width=clip.shape[2],
                motion_bucket_id=int(item["motion_bucket_id"]),
                fps_id=int(item["fps_id"]),
            )
            made.append(pipeline(clip[0], options).frames)
            real.append(clip)
        return {"fvd": self.fvd(made, real)}


def averaged_weights(module: TrainingModule) -> dict[str, Tensor]:
    """Return the engine's averaged weights, whole; all processes must call this."""
    model = {name: gathered(x) for name, x in module.engine.state_dict().items()}
    return with_adapters_merged(weights_of({"model": model, "ema": module.ema.state_dict()}))


def _engine_of(config: Mapping[str, Any], live: Any, weights: Mapping[str, Tensor]) -> Any:
    """Another engine with weights of its own, so that sampling leaves the live one alone."""
    engine = DiffusionEngine.without_weights(config)
    for name, module in live.named_modules():  # parts that the checkpoint lacked
        for child in [child for child, part in module._modules.items() if part is None]:
            engine.get_submodule(name)._modules[child] = None
    engine.load_state_dict(weights, assign=True)
    return engine


def _to_tensor(picture: Frames) -> Tensor:
    """(h, w, 3) -> (3, h, w) in [-1, 1]."""
    return torch.from_numpy(picture).movedim(-1, 0).float() / 127.5 - 1
