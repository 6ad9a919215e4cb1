"""`SamplingOptions` takes what it says it takes, and refuses the rest in one clear line."""

import json
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import numpy as np
import pytest
import torch

from sgm.inference.options import (
    GROUPS,
    SamplingOptions,
    describe,
    expected,
    option_fields,
    option_table,
)

NUMERIC = [f for f in option_fields() if f.metadata["kind"] in ("integer", "number", "numbers")]
CHOICES = [f for f in option_fields() if f.metadata["kind"] == "choice"]


def name(option):
    return option.name


def stored(option, value):
    kept = getattr(SamplingOptions(**{option.name: value}), option.name)
    return kept[0] if isinstance(kept, tuple) else kept


@pytest.mark.parametrize("option", NUMERIC, ids=name)
def test_both_ends_of_a_range_belong_to_it_and_nothing_beyond_does(option):
    """Caught: `<` for `<=`; a range in the help that is not the one checked."""
    low, high = option.metadata["min"], option.metadata["max"]
    assert stored(option, low) == low
    assert stored(option, high) == high
    for outside in (low - 1, high + 1):
        with pytest.raises(ValueError, match=rf"^{option.name} must be .* got ") as error:
            SamplingOptions(**{option.name: outside})
        assert expected(option) in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("option", NUMERIC, ids=name)
@pytest.mark.parametrize("value", [True, "12", float("nan"), float("inf"), {}, 1j], ids=repr)
def test_what_is_no_finite_number_is_refused(option, value):
    with pytest.raises(ValueError, match=rf"^{option.name} must be "):
        SamplingOptions(**{option.name: value})


@pytest.mark.parametrize("value", [1e3, np.float32(1000), np.int64(1000), 1000])
def test_whole_floats_become_integers_as_a_command_line_gives_them(value):
    seed = SamplingOptions(seed=value).seed
    assert seed == 1000
    assert type(seed) is int
    assert type(SamplingOptions(min_guidance=2).min_guidance) is float


def test_a_broken_integer_is_refused():
    with pytest.raises(ValueError, match=r"num_steps must be an integer .* got 2\.5"):
        SamplingOptions(num_steps=2.5)


@pytest.mark.parametrize("option", CHOICES, ids=name)
def test_choices_are_all_taken_and_others_are_named_in_the_error(option):
    for choice in option.metadata["choices"]:
        assert stored(option, choice) == choice
    with pytest.raises(ValueError, match=f"{option.name} must be one of .*'sideways'") as error:
        SamplingOptions(**{option.name: "sideways"})
    assert all(choice in str(error.value) for choice in option.metadata["choices"])


def test_torch_objects_serve_as_device_and_dtype():
    options = SamplingOptions(device=torch.device("cuda", 1), dtype=torch.bfloat16)
    assert (options.device, options.dtype) == ("cuda:1", "bfloat16")


@pytest.mark.parametrize("device", ["cuda:", "cuda:x", "CPU", "", "cuda 1", 1])
def test_what_does_not_look_like_a_device_is_refused(device):
    with pytest.raises(ValueError, match="device must be a device such as cpu"):
        SamplingOptions(device=device)


@pytest.mark.parametrize("colour", ["white", "black", "#ffcc00", "#FC0", "rebeccapurple"])
def test_colours(colour):
    assert SamplingOptions(background=colour).background == colour


@pytest.mark.parametrize("colour", ["#ggg", "whitish", "", 7])
def test_no_colours(colour):
    with pytest.raises(ValueError, match="background must be a colour"):
        SamplingOptions(background=colour)


@pytest.mark.parametrize("value", [10, [10.0], (10,), np.array([10.0])], ids=repr)
def test_angles_are_kept_as_a_tuple(value):
    assert SamplingOptions(elevations_deg=value).elevations_deg == (10.0,)


@pytest.mark.parametrize("value", [[], [0, 91], [0, "1"], "10", [None]], ids=repr)
def test_angles_that_are_none_are_refused(value):
    with pytest.raises(ValueError, match="elevations_deg must be a number or a list of them"):
        SamplingOptions(elevations_deg=value)


def test_a_switch_is_on_or_off():
    assert SamplingOptions(watermark=True).watermark is True
    for other in (1, 0, "true", "on"):
        with pytest.raises(ValueError, match="watermark must be true or false, got"):
            SamplingOptions(watermark=other)


def test_a_folder_is_kept_as_text():
    assert SamplingOptions(safety_filter=Path("a", "b")).safety_filter == str(Path("a", "b"))
    for other in (3, True, "", " ", ["a"]):
        with pytest.raises(ValueError, match="safety_filter must be a folder, got"):
            SamplingOptions(safety_filter=other)


def test_none_is_the_default_of_every_option():
    assert SamplingOptions(**{f.name: None for f in fields(SamplingOptions)}) == SamplingOptions()


def test_the_documented_defaults():
    options = SamplingOptions()
    given = {k: v for k, v in options.to_dict().items() if v is not None}
    assert given == {
        "seed": 23,
        "fps": 7,
        "motion_bucket_id": 127,
        "fit": "cover",
        "crop_x": 0.5,
        "crop_y": 0.5,
        "background": "white",
        "videos_per_image": 1,
        "watermark": False,
        "output": "frames",
    }


def test_a_round_trip_through_json_changes_nothing():
    options = SamplingOptions(seed=2**63 - 1, azimuths_deg=[0, 0.1], cond_aug=0.02, fit="contain")
    assert SamplingOptions.from_dict(json.loads(json.dumps(options.to_dict()))) == options


def test_unknown_names_bring_the_closest_known():
    with pytest.raises(ValueError, match=r"unknown option 'num_step'; did you mean num_steps"):
        SamplingOptions.from_dict({"num_step": 3})
    with pytest.raises(ValueError, match=r"unknown option 'zzz'; known: num_frames, "):
        SamplingOptions().replace(zzz=1)


def test_replace_checks_too_and_leaves_the_original():
    options = SamplingOptions(seed=1)
    assert options.replace(seed=2.0).seed == 2
    assert options.seed == 1
    with pytest.raises(ValueError, match="seed"):
        options.replace(seed=-1)
    with pytest.raises(FrozenInstanceError):
        options.seed = 3


def test_long_values_do_not_flood_the_message():
    with pytest.raises(ValueError, match="azimuths_deg") as error:
        SamplingOptions(azimuths_deg=["x" * 1000] * 1000)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("option", option_fields(), ids=name)
def test_every_option_is_described_for_every_front_end(option):
    meta = option.metadata
    assert meta["help"][0].isupper()
    assert meta["help"].endswith(".")
    assert meta["help"].count(". ") == 0, "one sentence"
    assert meta["group"] in [*GROUPS, "python"]
    assert {"unit", "min", "max", "step", "choices"} <= set(meta)
    assert (f"  --{option.name}  " in describe()) == (meta["group"] in GROUPS)
    assert f"| `{option.name}` |" in option_table()


def test_the_table_is_markdown_and_the_help_fits_the_terminal():
    rows = option_table().splitlines()
    assert len(rows) == 2 + len(fields(SamplingOptions))
    assert {row.count("|") for row in rows} == {5}
    assert max(len(line) for line in describe(width=60).splitlines()) <= 60


def test_options_load_neither_torch_nor_pillow():
    """Help and argument errors must answer at once."""
    code = (
        "import sys; from sgm.inference import SamplingOptions as S; S(num_steps=3);"
        "print({'torch', 'PIL', 'numpy', 'av'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
