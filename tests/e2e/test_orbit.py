"""SV3D, from a picture with transparency to the views around its object, on a tiny model."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

from sgm.inference import SamplingOptions, VideoPipeline
from sgm.inference.progress import Progress, SamplingStopped
from sgm.inference.safety import blur
from tests.judge import write_filter
from tests.tiny import tiny_config, tiny_engine

FRAMES = 4
QUICK = SamplingOptions(num_frames=FRAMES, num_steps=2, height=64, width=64)


def orbit_changes():
    """The tiny model in SV3D's form: camera angles as vector, frames decoded one by one."""
    params = OmegaConf.to_container(tiny_config().model.params, resolve=True)
    clip, _, _, picture, aug = params["conditioner_config"]["params"]["emb_models"]
    angles = [
        aug | {"input_key": key, "params": {"outdim": 16}} for key in ("polars_rad", "azimuths_rad")
    ]
    decoder = dict(params["first_stage_config"]["params"]["decoder_config"]["params"])
    decoder.pop("video_kernel_size")
    stage = params["first_stage_config"] | {
        "params": params["first_stage_config"]["params"]
        | {
            "encoder_config": {"target": "torch.nn.Identity"},
            "decoder_config": {
                "target": "sgm.modules.diffusionmodules.model.Decoder",
                "params": decoder,
            },
        }
    }
    return {
        "conditioner_config.params.emb_models": [clip, picture, aug, *angles],
        "first_stage_config": stage,
    }


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("orbit")
    changes = orbit_changes()
    save_file(tiny_engine(**changes).state_dict(), folder / "sv3d_p.safetensors")
    path = folder / "sv3d_p.yaml"
    OmegaConf.save(tiny_config(ckpt_path=str(folder / "sv3d_p.safetensors"), **changes), path)
    return VideoPipeline.from_spec("sv3d_p", config=path, device="cpu", dtype="float32")


def thing():
    """A red block, off centre, on a transparent ground."""
    pixels = np.zeros((80, 120, 4), dtype=np.uint8)
    pixels[10:30, 70:110] = (255, 0, 0, 255)
    return pixels


def test_the_last_view_is_the_object_centred_on_white(pipeline):
    """Caught: the condition picture as the first view, an object that is not centred or scaled."""
    video = pipeline(thing(), QUICK.replace(image_frame_ratio=0.5))
    assert video.frames.shape == (FRAMES, 64, 64, 3)
    last = video.frames[-1].astype(int)
    red = (last[..., 0] > 200) & (last[..., 1] < 60)
    rows, columns = np.where(red)
    assert (rows.min(), rows.max() + 1) == (24, 40)
    assert (columns.min(), columns.max() + 1) == (16, 48)
    assert (last[0, 0] == 255).all()


def test_camera_reaches_the_network(pipeline):
    """Caught: angles that no embedder is given."""
    first = pipeline(thing(), QUICK).frames[0]
    for change in ({"elevations_deg": 40.0}, {"azimuths_deg": [200.0, 100.0, 300.0, 0.0]}):
        assert (pipeline(thing(), QUICK.replace(**change)).frames[0] != first).any()


def test_a_picture_without_transparency_needs_the_background_removed(pipeline, monkeypatch):
    monkeypatch.setitem(sys.modules, "rembg", None)
    with pytest.raises(ValueError, match="rembg"):
        pipeline(thing()[..., :3], QUICK)


def test_the_background_of_a_picture_is_removed_once(pipeline, monkeypatch):
    """Caught: rembg called for every video of a picture."""
    calls = []

    def remove(image):
        calls.append(image)
        return Image.fromarray(thing())

    monkeypatch.setitem(sys.modules, "rembg", SimpleNamespace(remove=remove))
    videos = pipeline(thing()[..., :3], QUICK.replace(videos_per_image=2))
    assert len(calls) == 1
    assert np.array_equal(videos[0].frames, pipeline(thing(), QUICK).frames)


def test_callback_sees_every_step_and_can_stop(pipeline):
    """Caught: a stop that is not one, estimates of another shape, steps counted from zero."""
    seen: list[Progress] = []
    pipeline(thing(), QUICK, callback=seen.append)
    sampling = [p for p in seen if p.stage == "sampling"]
    assert [(p.step, p.total) for p in sampling] == [(1, 2), (2, 2)]
    assert sampling[0].sigma == pytest.approx(700.0)
    assert all(p.latents.shape == (FRAMES, 4, 16, 16) for p in sampling)
    assert [p.step for p in seen if p.stage == "decoding"][-1] == FRAMES
    with pytest.raises(SamplingStopped):
        pipeline(thing(), QUICK, callback=lambda p: p.stage != "sampling")


def test_outputs_are_the_same_video_in_other_forms(pipeline):
    """Caught: another range, order of axes or rounding."""
    frames = pipeline(thing(), QUICK).frames
    array = pipeline(thing(), QUICK.replace(output="numpy"))
    tensor = pipeline(thing(), QUICK.replace(output="tensor"))
    latents = pipeline(thing(), QUICK.replace(output="latents"))
    assert np.array_equal(np.rint(array * 255).astype(np.uint8), frames)
    assert torch.equal(tensor, torch.from_numpy(array).permute(0, 3, 1, 2))
    assert np.array_equal(pipeline(thing(), QUICK, latents=latents).frames, frames)


@pytest.mark.parametrize(
    ("dtype", "advice"),
    [
        (torch.float16, "torch.float16: try --dtype bfloat16 or float32, or lower"),
        (torch.bfloat16, "torch.bfloat16: try --dtype float32, or lower"),
        (torch.float32, "torch.float32: lower --max_guidance"),
    ],
)
def test_what_is_not_finite_is_an_error_and_no_black_video(pipeline, monkeypatch, dtype, advice):
    """Caught: a black video; the advice to take the type that it is in already."""
    noise = torch.full((FRAMES, 4, 16, 16), float("nan"))
    monkeypatch.setattr(pipeline.placement, "dtype", dtype)
    with pytest.raises(ValueError, match=f"the latents are not finite in {advice}"):
        pipeline(thing(), QUICK, noise=noise)


def test_noise_of_another_shape_is_refused(pipeline):
    with pytest.raises(ValueError, match="noise must have the shape"):
        pipeline(thing(), QUICK, noise=torch.zeros(FRAMES, 4, 8, 8))


def test_the_safety_filter_has_the_last_frame_too(pipeline, tmp_path):
    """Catches the picture's own view, which stands for the last frame, put in after the filter."""
    judged = QUICK.replace(safety_filter=write_filter(tmp_path / "filter", finds=True))
    assert np.array_equal(pipeline(thing(), judged).frames, blur(pipeline(thing(), QUICK).frames))
