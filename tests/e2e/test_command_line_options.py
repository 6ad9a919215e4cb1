"""What the options do to a run: precedence, frame rate, sizes, seeds, given noise and latents."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from sgm.inference import SamplingOptions, VideoPipeline
from sgm.inference.generation import cropped, padded
from sgm.inference.pictures import load_picture
from tests.recorded import noise
from tests.tiny import tiny_config, write_tiny_checkpoint

QUICK = SamplingOptions(num_frames=2, num_steps=1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture(scope="module")
def load(tmp_path_factory, weights):
    """A function that loads the tiny model with changes to its YAML."""

    def load(**changes):
        path = tmp_path_factory.mktemp("config") / "svd_tiny.yaml"
        OmegaConf.save(tiny_config(ckpt_path=str(weights), **changes), path)
        return VideoPipeline.from_spec(config=path, device="cpu", dtype="float32")

    return load


@pytest.fixture(scope="module")
def pipeline(load):
    return load()


def picture(height=60, width=90):
    random = np.random.default_rng(0)
    return load_picture(random.integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("options", "told"), [({}, 6), ({"fps": 12}, 11), ({"fps": 12, "fps_id": 3}, 3)]
)
def test_frame_rate_reaches_the_embedder_less_one(pipeline, options, told):
    """Caught: fps without the - 1; fps_id that changes the file; the raw reference meaning."""
    conditioner = pipeline.engine.conditioner
    embedder = conditioner.embedders[conditioner.input_keys.index("fps_id")]
    seen = []
    hook = embedder.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    video = pipeline(picture(), QUICK.replace(**options))
    hook.remove()
    assert seen
    assert all((values == told).all() for values in seen)
    assert video.fps == options.get("fps", 7)


def test_a_flag_goes_before_the_yaml_and_that_before_the_row(load):
    """Caught: a default of the row in place of the YAML's number, and the reverse."""
    changed = load(
        **{
            "sampler_config.params.num_steps": 3,
            "sampler_config.params.guider_config.params.num_frames": 5,
        }
    )
    bare = load(sampler_config=None)

    def lengths(pipeline, **flags):
        options = pipeline.settings(picture(), SamplingOptions(**flags)).options
        return options.num_steps, options.num_frames

    assert lengths(changed, num_steps=7, num_frames=6) == (7, 6)
    assert lengths(changed) == (3, 5)
    assert lengths(bare) == (bare.spec.num_steps, bare.spec.num_frames)
    guider = bare.settings(picture()).sampler_config["params"]["guider_config"]["params"]
    assert guider["max_scale"] == bare.spec.max_guidance


def test_a_sampler_swapped_in_the_yaml_is_the_one_that_runs(load, pipeline):
    """Caught: the row's sampler or scales put over the YAML's."""
    heun = "sgm.modules.diffusionmodules.sampling.HeunEDMSampler"
    swapped = load(**{"sampler_config.target": heun})
    options = QUICK.replace(num_steps=2)
    config = swapped.settings(picture(), options.replace(max_guidance=9.0)).sampler_config
    assert config["target"] == heun
    assert config["params"]["guider_config"]["params"]["max_scale"] == 9.0
    by_yaml = swapped(picture(), options).frames
    assert np.array_equal(by_yaml, pipeline(picture(), options.replace(sampler="heun")).frames)
    assert not np.array_equal(by_yaml, pipeline(picture(), options).frames)


@pytest.mark.parametrize("size", [(64, 64), (66, 70), (64, 130), (78, 64), (65, 67)])
def test_any_size_comes_out_exactly(pipeline, size):
    """Caught: a size rounded to what the network takes; a crop off by the padding."""
    height, width = size
    assert pipeline(picture(), QUICK.replace(height=height, width=width)).frames.shape == (
        *(2, height, width, 3),
    )


def test_padding_is_cropped_where_it_was_put():
    """The frames of a padded size are the middle of those of the padded picture."""
    pixels = noise("pixels", 3, 66, 70)
    wide = padded(pixels, 8)
    assert wide.shape == (3, 72, 72)
    assert torch.equal(wide[:, 3:69, 1:71], pixels)
    assert torch.equal(cropped(wide, (66, 70)), pixels)
    assert padded(noise("thin", 3, 1, 9), 8).shape == (3, 8, 16)  # no row to mirror


def test_one_side_alone_keeps_the_orientation_of_the_picture(load, monkeypatch):
    pipeline = load()
    wide = type(pipeline.spec)(**{**vars(pipeline.spec), "height": 64, "width": 128})
    monkeypatch.setattr(
        pipeline, "files", type(pipeline.files)(**{**vars(pipeline.files), "spec": wide})
    )
    assert pipeline.settings(picture(60, 90)).size == (64, 128)
    assert pipeline.settings(picture(90, 60)).size == (128, 64)
    assert pipeline.settings(picture(90, 60), QUICK.replace(height=100)).size == (100, 64)
    assert pipeline(picture(90, 60), QUICK).frames.shape == (2, 128, 64, 3)


def test_given_noise_takes_the_place_of_the_seed(pipeline):
    """Caught: noise ignored, or scaled twice. The seed still draws the picture's own noise."""
    noise = torch.zeros(2, 4, 16, 16)
    still = QUICK.replace(cond_aug=0)
    one, other = (pipeline(picture(), still.replace(seed=s), noise=noise) for s in (1, 2))
    assert np.array_equal(one.frames, other.frames)
    with pytest.raises(ValueError, match=r"noise must have the shape \(2, 4, 16, 16\)"):
        pipeline(picture(), QUICK, noise=torch.zeros(1, 4, 16, 16))


def test_given_latents_are_decoded_as_they_are(pipeline):
    latents = pipeline(picture(), QUICK.replace(output="latents"))
    again = pipeline(picture(), QUICK, latents=latents)
    assert np.array_equal(again.frames, pipeline(picture(), QUICK).frames)


@pytest.mark.parametrize("output", ["latents", "tensor"])
def test_results_are_tensors_that_autograd_takes(pipeline, output):
    """Caught: tensors of inference mode."""
    made = pipeline(picture(), QUICK.replace(output=output))
    weight = torch.ones((), requires_grad=True)
    (made * weight).sum().backward()
    assert weight.grad == pytest.approx(made.sum().item(), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("dtype", ["foo", "float64", torch.float64])
def test_another_type_is_refused_before_anything_is_looked_at(pipeline, dtype):
    with pytest.raises(ValueError, match="dtype must be one of float32, float16, bfloat16, got"):
        VideoPipeline.from_spec("svd_tiny", dtype=dtype)


@pytest.mark.parametrize(
    ("own", "asked", "fits"),
    [
        *(("cpu", "cpu", True), ("cpu", "tpu", False), ("cpu", "cuda", False)),
        *(("cuda:0", "cuda", True), ("cuda:0", "cuda:0", True), ("cuda:0", "cuda:1", False)),
        *(("cuda", "cuda:0", True), ("cuda:1", "cuda", True), ("cuda:1", "cuda:0", False)),
    ],
)
def test_options_of_another_device_are_refused(pipeline, monkeypatch, own, asked, fits):
    """Caught: a run on the first GPU for options that name the second."""
    monkeypatch.setattr(pipeline, "device", torch.device(own))
    if fits:
        assert pipeline.settings(picture(), QUICK.replace(device=asked)).options.device == own
    else:
        with pytest.raises(ValueError, match=f"device is {own} in this pipeline, got {asked}"):
            pipeline.settings(picture(), QUICK.replace(device=asked))


@pytest.mark.parametrize(
    ("change", "value", "message"),
    [
        ("sampler_config.params.foo", 1, "BaseDiffusionSampler.* unexpected keyword .*'foo'"),
        ("sampler_config.params.discretization_config.params.rho", 0, "rho other than 0"),
        ("network_config.params.channel_mult", [], "model: .* cannot be built"),
    ],
)
def test_mistakes_in_a_yaml_are_named(load, change, value, message):
    """Caught: errors of other types than the front ends tell, from deep inside of constructors."""
    with pytest.raises(ValueError, match=message):
        load(**{change: value})


def test_a_seed_means_the_same_beside_others(pipeline):
    _, second = pipeline(picture(), QUICK.replace(videos_per_image=2, seed=30))
    assert np.array_equal(second.frames, pipeline(picture(), QUICK.replace(seed=31)).frames)


def test_settings_leave_no_question_open(pipeline):
    """A run with all its settings as options is the same run."""
    settings = pipeline.settings(picture(), QUICK)
    assert settings.options.device == "cpu"
    assert settings.options.dtype == "float32"
    assert pipeline.settings(picture(), settings.options) == settings
