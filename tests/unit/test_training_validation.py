"""What validation measures, each against a second derivation, and what it shows."""

import json

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from sgm.data.metrics import psnr
from sgm.inference import VideoPipeline
from sgm.inference.options import SamplingOptions
from sgm.inference.settings import ModelFiles
from sgm.inference.specs import SPECS
from sgm.modules.ema import Ema
from sgm.training import metrics
from sgm.training.metrics import FrechetVideoDistance, frechet_distance, ssim
from sgm.training.module import TrainingModule
from sgm.training.optim import Optim
from sgm.training.reporting import make_logger, show_video
from sgm.training.samples import Videos
from sgm.training.tasks import DiffusionTask
from sgm.training.validation import averages_in_evaluation
from tests.tiny import FRAMES, tiny_config, tiny_engine


def test_ssim_is_scikit_images():
    """Catches another window, other constants, sample variances, and edges that count.

    The expected numbers are those of scikit-image 0.26, ``structural_similarity`` with
    ``gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255``.
    """
    r = np.random.default_rng(0)
    a = r.integers(0, 256, (24, 31, 3), dtype=np.uint8)
    b = np.clip(a.astype(int) + r.integers(-60, 61, a.shape), 0, 255).astype(np.uint8)
    assert ssim(a, b) == pytest.approx(0.9101695487275673, abs=1e-9)
    assert ssim(a[:, ::-1].copy(), b) == pytest.approx(-0.035131625082660434, abs=1e-9)
    assert ssim(a, a) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="11 pixels or more"):
        ssim(a[:10], b[:10])


def test_frechet_distance_of_gaussians():
    """Catches a root of the wrong matrix and variances in place of deviations: for independent
    coordinates it is the sum of squared differences of means and deviations."""
    r = np.random.default_rng(1)
    x = r.standard_normal((200, 3))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    scale, shift = np.array([2.0, 1.0, 0.5]), np.array([0.0, 3.0, 1.0])
    turn = np.linalg.qr(r.standard_normal((3, 3)))[0]
    expected = (shift**2).sum() + ((scale - 1) ** 2).sum()
    other = x * scale + shift
    assert frechet_distance(x @ turn, other @ turn) == pytest.approx(expected)
    assert frechet_distance(other, other) == pytest.approx(0.0, abs=1e-6)


class Means(torch.nn.Module):
    """In the place of I3D: the mean of each colour."""

    def forward(
        self,
        x: torch.Tensor,
        rescale: bool,  # noqa: ARG002
        resize: bool,  # noqa: ARG002
        return_features: bool,  # noqa: ARG002
    ) -> torch.Tensor:
        return x.mean(dim=[2, 3, 4])


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_fvd_by_a_file(tmp_path):
    """Catches clips whose colours, size or range are not what the network takes."""
    path = tmp_path / "network.pt"
    torch.jit.save(torch.jit.script(Means()), str(path))
    fvd = FrechetVideoDistance(path)
    clips = [np.full((10, 8, 8, 3), value, np.uint8) for value in (0, 51, 255)]
    assert np.allclose(fvd.features(clips), [[-1] * 3, [-0.6] * 3, [1] * 3], atol=1e-6)
    assert fvd(clips, clips) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="10 frames or more"):
        fvd([clip[:9] for clip in clips], clips)
    with pytest.raises(ValueError, match="no I3D file"):
        FrechetVideoDistance(tmp_path / "none.pt")
    (tmp_path / "other.pt").write_text("x")
    with pytest.raises(ValueError, match="not a TorchScript file"):
        FrechetVideoDistance(tmp_path / "other.pt")


def test_lpips_is_named_where_it_is_missing(monkeypatch, tmp_path):
    """Catches a download, and a figure that is silently left out."""
    with pytest.raises(ValueError, match="one of vgg, alex, squeeze"):
        metrics.perceptual_distance("vgg19")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match=r"pip install lpips|vgg16-397923af\.pth"):
        metrics.perceptual_distance("vgg")


# ---------------------------------------------------------------- in training
class Trainer:
    """What the callbacks look at of Lightning's."""

    def __init__(self, folder):
        self.default_root_dir, self.global_step, self.is_global_zero = str(folder), 0, True
        self.loggers = []


@pytest.fixture
def module():
    """A model in training whose averages are not its weights."""
    task = DiffusionTask(trainable=["model.diffusion_model"])
    made = TrainingModule(tiny_engine(seed=2), task, Optim(lr=1.0, ema=0.9), seed=0)
    made.ema = Ema(made.engine.named_parameters(), 0.9)
    with torch.no_grad():
        for p in made.trained:
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    return made


@pytest.fixture
def picture(tmp_path):
    """A picture file, not of the video's size."""
    path = tmp_path / "lake.png"
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((120, 90)).save(path)
    return path


def test_videos_are_those_of_the_averaged_weights(tmp_path, module, picture):
    """Catches videos by the weights of the last step, or by other options than users have; numbers
    of another picture; and training that goes on with other weights, types or gradients."""
    config = dict(tiny_config().model)
    options = {"width": 64, "height": 64, "num_frames": FRAMES, "num_steps": 2, "seed": 4}
    videos = Videos(config, "svd_tiny", [str(picture)], buckets=[20, 200], options=options)
    before = {name: p.detach().clone() for name, p in module.engine.named_parameters()}
    learning = [p.requires_grad for p in module.engine.parameters()]
    trainer = Trainer(tmp_path / "run")
    videos.on_train_start(trainer, module)
    videos.on_train_end()
    assert learning == [p.requires_grad for p in module.engine.parameters()]
    for name, p in module.engine.named_parameters():
        assert torch.equal(p, before[name])
        assert p.dtype == before[name].dtype
    files = ModelFiles(SPECS["svd_tiny"], tmp_path, config, tmp_path)
    asked = SamplingOptions.from_dict(options | {"motion_bucket_id": 200})
    frames = VideoPipeline(tiny_engine(seed=2), files)(picture, asked).frames
    line = json.loads((tmp_path / "run" / "samples.jsonl").read_text())
    shown = videos.pictures["lake"]
    twenty = VideoPipeline(tiny_engine(seed=2), files)(
        picture, asked.replace(motion_bucket_id=20)
    ).frames
    expected = (psnr(frames[0], shown) + psnr(twenty[0], shown)) / 2
    assert line["first frame psnr"] == pytest.approx(expected, rel=1e-5)
    assert line.keys() >= {"first frame ssim", "motion over asked, bucket 200"}
    made = sorted(path.name for path in (tmp_path / "run" / "samples" / "step_0000000").iterdir())
    assert made == ["lake_bucket_20.mp4", "lake_bucket_200.mp4"]


def test_measuring_leaves_the_module_as_it_was(module):
    """Catches weights, modes or dropout that stay as they were for the measurement."""
    module.engine.model.train()
    weights = [p.detach().clone() for p in module.trained]
    modes = [each.training for each in module.engine.modules()]
    with averages_in_evaluation(module):
        assert not any(each.training for each in module.engine.modules())
        assert not torch.equal(module.trained[0], weights[0])
    assert modes == [each.training for each in module.engine.modules()]
    assert all(torch.equal(p, w) for p, w in zip(module.trained, weights, strict=True))


def test_what_is_missing_is_named(tmp_path, picture):
    """Catches an unknown option or place to show that is silently ignored."""
    config = dict(tiny_config().model)
    with pytest.raises(ValueError, match="unknown option 'num_step'"):
        Videos(config, "svd_tiny", [str(picture)], options={"num_step": 2})
    with pytest.raises(ValueError, match=r"none\.png"):
        Videos(config, "svd_tiny", [str(tmp_path / "none.png")])
    with pytest.raises(ValueError, match="both of fvd and dataset"):
        Videos(config, "svd_tiny", [str(picture)], fvd="x.pt")
    with pytest.raises(ValueError, match="expected tensorboard, wandb or none"):
        make_logger("paper", tmp_path)
    assert make_logger("none", tmp_path) is False


def test_tensorboard_has_the_video(tmp_path, picture):
    """Catches a video that TensorBoard shows as one picture."""
    pytest.importorskip("tensorboard", reason="needs TensorBoard: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from sgm.inference.videos import Video

    trainer = Trainer(tmp_path)
    trainer.loggers = [make_logger("tensorboard", tmp_path)]
    frames = np.zeros((5, 16, 16, 3), np.uint8)
    frames[:, :, :, 0] = 50 * np.arange(5)[:, None, None]
    show_video(trainer, "samples/lake", Video(frames, 7), tmp_path / "lake.mp4")
    trainer.loggers[0].finalize("success")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (image,) = events.Images("samples/lake")
    (tmp_path / "back.gif").write_bytes(image.encoded_image_string)
    with Image.open(tmp_path / "back.gif") as gif:
        assert gif.n_frames == 5


def test_callbacks_are_lightnings():
    """Catches a callback that Lightning would not call."""
    assert issubclass(Videos, pl.Callback)
