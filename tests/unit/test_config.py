"""Values of wrong types are found in a config before anything is built, by their place in it."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from omegaconf import OmegaConf

from scripts.sampling.simple_video_sample import main
from sgm.config import build, check_arguments, check_types
from tests.tiny import tiny_config, write_tiny_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def described(**changes):
    return OmegaConf.to_container(tiny_config(**changes), resolve=True)["model"]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("scale_factor", "x", "scale_factor: expected a number, got 'x'"),
        ("network_config.params", 3, "network_config.params: expected names and values, got 3"),
        (
            "network_config.params.model_channels",
            "wide",
            "network_config.params.model_channels: expected an integer, got 'wide'",
        ),
        (
            "first_stage_config.params.decoder_config.params.ch",  # a parameter of the base class
            2.5,
            "first_stage_config.params.decoder_config.params.ch: expected an integer, got 2.5",
        ),
        (
            "conditioner_config.params.emb_models",
            [{"target": "sgm.modules.encoders.modules.ConcatTimestepEmbedderND",
              "params": {"outdim": True}}],
            "conditioner_config.params.emb_models[0].params.outdim: expected an integer, got True",
        ),
    ],
)  # fmt: skip
def test_the_place_and_the_expectation_are_named(path, value, message):
    """Catches objects inside of lists and of parameters that are passed over, and true as 1."""
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole text is compared
        check_types(described(**{path: value}), "model")
    assert str(error.value) == f"model.params.{message}"


def takes(
    number: float,
    numbers: Sequence[float] | float,
    choice: Literal["a", "b"] | None,
    anything: Any,
    items: Iterable[Mapping[str, Any]],
    pair: tuple[int, int],
) -> None:
    """A function to call."""


@pytest.mark.parametrize(
    ("name", "good", "bad", "words"),
    [
        ("number", [1, 1.5], ["1", None, True, [1]], "a number"),
        ("numbers", [1, [1, 2.0], []], ["12", ["1"], {}], "a list (each a number) or a number"),
        ("choice", ["a", None], ["c", 1], "'a' or 'b' or null"),
        ("anything", [1, "x", None, {}], [], ""),
        ("items", [[{"a": 1}], []], [[1], "ab"], "a list (each names and values)"),
        ("pair", [[1, 2]], [1, ["1", 2]], "a list (each an integer)"),
        ("unknown", [1], [], ""),  # the call itself refuses it, by its name
    ],
)
def test_values_against_annotations(name, good, bad, words):
    for value in good:
        check_arguments(takes, {name: value}, "here")
    for value in bad:
        with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole text is compared
            check_arguments(takes, {name: value}, "here")
        assert str(error.value) == f"here.{name}: expected {words}, got {value!r}"


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("configs/*.yaml"), *ROOT.glob("tests/data/yaml/*.yaml")]), ids=str
)
def test_published_configs_pass(path):
    """Catches an annotation that is narrower than what published files say."""
    check_types(OmegaConf.to_container(OmegaConf.load(path), resolve=True)["model"], "model")


def test_what_a_constructor_refuses_is_an_error_with_its_place():
    """Catches a traceback where a value has the right type and makes no sense."""
    config = described(**{"network_config.params.channel_mult": []})["params"]["network_config"]
    with pytest.raises(ValueError, match=r"^here: sgm\..*VideoUNet cannot be built: "):
        build(config, "here")


def test_the_command_line_says_it_in_one_line(tmp_path, capsys):
    """Catches a traceback from the estimate, which builds parts of the model before loading."""
    config = tiny_config(**{"first_stage_config.params.decoder_config.params.ch": "wide"})
    OmegaConf.save(config, tmp_path / "mine.yaml")
    weights = write_tiny_checkpoint(tmp_path / "tiny.safetensors")
    flags = ["--version", "svd_tiny", "--config", str(tmp_path / "mine.yaml")]
    flags += ["--ckpt_path", str(weights), "--output_folder", str(tmp_path)]
    assert main([str(ROOT / "assets" / "sample.jpg"), *flags]) == 2
    place = "model.params.first_stage_config.params.decoder_config.params.ch"
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {tmp_path / 'mine.yaml'}: {place}: expected an integer, got 'wide'"
    )
