"""The operator's settings file: read strictly, and held against what visitors ask for."""

from dataclasses import fields
from pathlib import Path

import pytest

from sgm.inference.options import GROUPS, SamplingOptions
from sgm.inference.settings import find_model, resolve
from sgm.serving.limits import Limits


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "settings.yaml"
        path.write_text(text)
        return path

    return write


def settings(**options):
    files = find_model("svd_tiny")
    return resolve(SamplingOptions(**options), files.config, files.spec, (64, 64))


def test_every_entry_can_be_set(file):
    # Catches: an entry that cannot be written in YAML, or is dropped.
    values = {
        "models": ["svd", "svd_tiny"], "max_frames": 50, "max_steps": 40, "max_pixels": 262144,
        "max_videos": 2, "max_pictures": 3, "max_upload_mb": 5.5, "max_upload_megapixels": 24,
        "max_queue": 9, "max_waiting": 2, "abandoned_seconds": 30, "keep_runs": 7,
        "keep_days": 1.5,
        "share_outputs": True, "output_folder": "/srv/videos", "watermark": True,
        "safety_filter": "/srv/filter",
    }  # fmt: skip
    assert values.keys() == {each.name for each in fields(Limits)}
    text = "\n".join(f"{name}: {value}" for name, value in values.items())
    read = Limits.read(file(text))
    expected = values | {"models": ("svd", "svd_tiny"), "output_folder": Path("/srv/videos")}
    assert {name: getattr(read, name) for name in expected} == expected


def test_nothing_given_is_the_defaults(file):
    assert Limits.read(None) == Limits.read(file("# nothing yet\n")) == Limits()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_frame: 3", "unknown entry 'max_frame'; known: models, max_frames"),
        ("max_frames: many", "max_frames: expected an integer, got 'many'"),
        ("max_frames: true", "max_frames: expected an integer, got True"),
        ("max_frames: 0", "max_frames must be at least 1, got 0"),
        ("max_upload_mb: .nan", "max_upload_mb must be at least 0, got nan"),
        ("models: svd_tiny", "models: expected a list"),
        ("models: [svd_large]", "version must be one of"),
        ("models: []", "models must name one at least"),
        ("output_folder: 3", "output_folder must be the path of a folder, got 3"),
        ("- max_frames", "expected names and values"),
        ("max_frames: [", "while parsing"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(file, text, message):
    with pytest.raises(ValueError, match=r"settings '.*settings\.yaml': ") as error:
        Limits.read(file(text))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.yaml': No such file or directory"):
        Limits.read(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 101}, "num_frames must be at most 100 here, got 101"),
        ({"num_steps": 30}, "num_steps must be at most 25 here, got 30"),
        ({"height": 256, "width": 192}, "height x width must be at most 16384 here, got 49152 ("),
        ({"videos_per_image": 5}, "videos_per_image must be at most 4 here, got 5"),
    ],
)
def test_runs_beyond_a_limit_are_refused(options, message):
    limits = Limits(max_steps=25, max_pixels=128 * 128)
    limits.check(settings(num_frames=100, num_steps=25, height=128, width=128, videos_per_image=4))
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is looked at
        limits.check(settings(**options))
    assert str(error.value).startswith(message)


def test_a_limit_also_holds_for_the_models_own_values():
    # Catches: only what a visitor sets is looked at.
    with pytest.raises(ValueError, match="num_frames must be at most 10 here, got 14"):
        Limits(max_frames=10).check(settings())


@pytest.mark.parametrize(
    "option", [{"lora": "/etc/passwd"}, {"safety_filter": "/home"}, {"device": "cpu"}]
)
def test_visitors_name_no_files_and_no_device(option):
    # Catches: an option that is refused, and offered all the same.
    offered = [each.name for group in GROUPS for each in Limits().offered(group)]
    assert not option.keys() & set(offered)
    with pytest.raises(ValueError, match="is for the operator to set, not for visitors"):
        Limits().enforce(SamplingOptions(**option))


def test_what_the_operator_decides_replaces_what_a_visitor_asks_for():
    # Catches: a false that counts as nothing said.
    asked = SamplingOptions(watermark=True, seed=4)
    assert Limits().enforce(asked) == asked
    decided = Limits(watermark=False, safety_filter="/srv/filter").enforce(asked)
    assert (decided.watermark, decided.safety_filter) == (False, "/srv/filter")
    assert decided.seed == 4
