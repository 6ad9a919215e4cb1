"""``svd_xt_lcm``: a U-Net alone over the other weights of svd_xt, sampled in four steps."""

import pytest
import torch

from sgm.convert import plan
from sgm.inference.options import SamplingOptions
from sgm.inference.settings import GUIDER_TARGETS, SAMPLER_TARGETS, find_model, read_config, resolve
from sgm.inference.specs import SPECS, find_config
from sgm.inference.weights import tell_model
from sgm.util import instantiate_from_config
from tests.sparse import published_shapes, write_sparse

SPEC = SPECS["svd_xt_lcm"]


def resolved(**options):
    config = read_config(find_config("svd_xt_lcm"))
    return resolve(SamplingOptions(**options), config, SPEC, (576, 1024))


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    """The keys of AnimateLCM-SVD-xt's file: diffusers' names of svd's U-Net, nothing else."""
    native = {
        key: shape
        for key, shape in published_shapes("svd").items()
        if key.startswith("model.diffusion_model.")
    }
    conversion = plan(native, source="native", target="diffusers", partial=True)
    keys = {key.removeprefix("unet/"): shape for key, shape in conversion.shapes.items()}
    return write_sparse(tmp_path_factory.mktemp("unet") / SPEC.file, keys)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_four_steps_without_guidance_are_what_the_yaml_says():
    settings = resolved()
    assert settings.options.num_steps == 4
    assert settings.frames == 25
    assert settings.sampler_config["target"] == SAMPLER_TARGETS["lcm"]
    guider = settings.sampler_config["params"]["guider_config"]
    assert guider["target"] == GUIDER_TARGETS["none"]
    sampler = instantiate_from_config(settings.sampler_config)
    assert sampler.guider.copies == 1
    # The 1st, 11th, 21st and 31st of 40 levels, by hand: (700^(1/7) + k/39 (...))^7
    levels = torch.tensor(sampler.noise_levels(4))
    expected = torch.tensor([700.0, 128.5637, 13.6784, 0.4969, 0.0])
    torch.testing.assert_close(levels, expected, rtol=1e-4, atol=0)


def test_a_flag_still_wins():
    assert resolved(num_steps=8).options.num_steps == 8
    euler = resolved(sampler="euler").sampler_config
    assert euler["target"] == SAMPLER_TARGETS["euler"]
    assert "train_steps" not in euler["params"]
    guided = resolved(guidance_shape="linear").sampler_config
    scales = instantiate_from_config(guided).guider.frame_scales(3)
    torch.testing.assert_close(scales, torch.tensor([1.0, 1.1, 1.2]))


def test_the_sampler_serves_other_models_too():
    """Catches: svd_xt's own levels used up to the lowest one, of which a step makes nothing."""
    config = read_config(find_config("svd_xt"))
    settings = resolve(SamplingOptions(sampler="lcm"), config, SPECS["svd_xt"], (576, 1024))
    sampler = instantiate_from_config(settings.sampler_config)
    assert len(sampler.noise_levels(30)) == 31
    assert min(sampler.noise_levels(4)[:-1]) > 0.4


def test_the_file_is_known_by_its_name_as_its_keys_are_those_of_any_u_net(unet, tmp_path):
    assert tell_model(unet) is SPEC
    other = tmp_path / "AnimateLCM-SVD-xt-1.1.safetensors"
    other.symlink_to(unet)
    assert tell_model(other) is SPEC
    unnamed = tmp_path / "unet.safetensors"
    unnamed.symlink_to(unet)
    with pytest.raises(ValueError, match=r"unet\.safetensors may be svd_xt_lcm, its name does"):
        tell_model(unnamed)


def test_it_lies_over_the_weights_of_svd_xt(unet, place):
    with pytest.raises(ValueError, match=r"U-Net of svd_xt_lcm alone, .*download\.py svd_xt'"):
        find_model("svd_xt_lcm", ckpt_path=unet)
    base = write_sparse(place / "checkpoints" / "svd_xt.safetensors", published_shapes("svd"))
    files = find_model("svd_xt_lcm", ckpt_path=unet)
    assert (files.checkpoint, files.base) == (unet, base)
    assert files.weight_files() == (unet, base)


def test_a_whole_file_needs_no_other(place):
    path = write_sparse(place / "merged.safetensors", published_shapes("svd"))
    assert find_model("svd_xt_lcm", ckpt_path=path).base is None


def test_it_is_there_when_both_files_are(unet, place):
    """Catches: a model offered that cannot be loaded."""
    own = place / "checkpoints" / "svd_xt_lcm.safetensors"
    own.parent.mkdir()
    own.symlink_to(unet)
    assert SPEC.checkpoint is None
    (place / "checkpoints" / "svd_xt.safetensors").touch()
    assert SPEC.checkpoint == own
