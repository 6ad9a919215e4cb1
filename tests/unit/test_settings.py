"""Flags, YAML and row: who decides about sampler and guidance."""

import pytest
from omegaconf import OmegaConf

from sgm.inference.options import SamplingOptions
from sgm.inference.settings import GUIDER_TARGETS, SAMPLER_TARGETS, read_config, resolve
from sgm.inference.specs import SPECS
from sgm.util import instantiate_from_config
from tests.tiny import tiny_config

GUIDERS = "sgm.modules.diffusionmodules.guiders"


def resolved(yaml=None, spec="svd", **options):
    config = {"params": {"sampler_config": yaml}} if yaml else {}
    return resolve(SamplingOptions(**options), config, SPECS[spec], (576, 1024)).sampler_config


def scales(sampler_config, frames=5):
    return instantiate_from_config(sampler_config).guider.frame_scales(frames).tolist()


def yaml_sampler(name="heun", guider=None, **params):
    guider = guider or {"target": f"{GUIDERS}.VanillaCFG", "params": {"scale": 7.0}}
    discretization = {
        "target": "sgm.modules.diffusionmodules.discretizer.EDMDiscretization",
        "params": {"sigma_max": 80.0},
    }
    common = {"discretization_config": discretization, "guider_config": guider}
    return {"target": SAMPLER_TARGETS[name], "params": common | params}


def test_a_yaml_without_a_sampler_gets_the_row_of_the_model():
    """Caught: the row's guidance or noise levels of another model."""
    config = resolved()
    assert config["target"] == SAMPLER_TARGETS["euler"]
    assert config["params"]["discretization_config"]["params"] == {"sigma_max": 700.0}
    assert scales(config) == [1.0, 1.375, 1.75, 2.125, 2.5]
    assert scales(resolved(spec="sv3d_u")) == [1.0, 1.75, 2.5, 1.75, 1.0]


def test_the_yaml_is_used_as_it_is():
    """Caught: a default of the row that overwrites a sampler or scale swapped in a YAML."""
    sampler = yaml_sampler(s_churn=3.0)
    assert resolved(sampler) == sampler


def test_a_flag_changes_what_it_names_and_no_more():
    """Caught: another sampler that forgets the YAML's noise levels or guidance, or keeps its own
    sampler's parameters (s_churn), which the other one does not take."""
    config = resolved(yaml_sampler(s_churn=3.0), sampler="dpmpp_2m")
    assert config["target"] == SAMPLER_TARGETS["dpmpp_2m"]
    assert "s_churn" not in config["params"]
    assert config["params"]["discretization_config"]["params"] == {"sigma_max": 80.0}
    assert scales(config) == [7.0] * 5


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_guidance": 4.0}, [4.0] * 3),
        ({"guidance_shape": "linear", "min_guidance": 1.0, "max_guidance": 3.0}, [1.0, 2.0, 3.0]),
        ({"guidance_shape": "linear", "min_guidance": 3.0}, [3.0, 5.0, 7.0]),
        ({"guidance_shape": "triangle", "min_guidance": 2.0, "max_guidance": 4.0}, [2.0, 4.0, 2.0]),
    ],
)
def test_guidance_flags_over_a_constant_yaml(options, expected):
    assert scales(resolved(yaml_sampler(), **options), 3) == expected


def test_no_guidance_is_the_identity():
    config = resolved(yaml_sampler(), guidance_shape="none")
    assert config["params"]["guider_config"] == {"target": GUIDER_TARGETS["none"], "params": {}}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_guidance": 2.0}, "constant guidance"),
        ({"guidance_shape": "linear", "min_guidance": 9.0}, "must not exceed"),
    ],
)
def test_contradictions_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        resolved(yaml_sampler(), **options)


@pytest.mark.parametrize("flag", ["min_guidance", "max_guidance"])
def test_scales_are_refused_where_the_guider_of_the_yaml_knows_none(flag):
    """Caught: a parameter that the guider refuses only when the model has been loaded."""
    guider = {"target": f"{GUIDERS}.PerFrameGuider", "params": {"scales": [1.0, 2.0]}}
    with pytest.raises(ValueError, match="mean nothing to the config's PerFrameGuider"):
        resolved(yaml_sampler(guider=guider), **{flag: 2.0})
    shaped = resolved(yaml_sampler(guider=guider), guidance_shape="linear", **{flag: 2.0})
    assert min(scales(shaped)) <= 2.0 <= max(scales(shaped))


def test_a_scale_that_only_the_guider_knows_counts_in_the_comparison():
    """Caught: a triangle turned over by a highest scale below the guider's default of 1."""
    guider = {"target": GUIDER_TARGETS["triangle"], "params": {"max_scale": 2.5}}
    with pytest.raises(ValueError, match=r"must not exceed max_guidance, got 1.0 and 0.5"):
        resolved(yaml_sampler(guider=guider), max_guidance=0.5)
    lower = resolved(yaml_sampler(guider=guider), min_guidance=0.0, max_guidance=0.5)
    assert scales(lower) == [0.0, 0.25, 0.5, 0.25, 0.0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"params": None}, "expected 'network_config' with a 'target' in it"),
        ({"params": [1]}, r"expected 'params' to hold names and values, got \[1\]"),
        ({"params.sampler_config": "euler"}, "expected 'sampler_config' to hold names and values"),
        ({"params.sampler_config.params": 3}, "expected 'params' to hold names and values, got 3"),
        ({"params.sampler_config.params.guider_config": {}}, "expected 'guider_config' with a"),
        (
            {"params.sampler_config.params.discretization_config": None},
            "expected 'discretization_config' with a 'target' in it",
        ),
        ({"params.denoiser_config": None}, "expected 'denoiser_config' with a 'target' in it"),
        ({"params.network_config": ["x"]}, "expected 'network_config' to hold names and values"),
    ],
)
def test_a_config_of_another_form_is_refused_when_it_is_read(tmp_path, changes, words):
    """Caught: a KeyError or AttributeError where the missing part is looked up."""
    config = tiny_config()
    for path, value in changes.items():
        OmegaConf.update(config, f"model.{path}", value, merge=False)
    OmegaConf.save(config, tmp_path / "model.yaml")
    with pytest.raises(ValueError, match=rf"^config '.*model.yaml': {words}"):
        read_config(tmp_path / "model.yaml")
