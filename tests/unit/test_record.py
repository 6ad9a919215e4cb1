"""The record of a video: what it holds, when two are the same, how one is repeated."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from sgm.inference import record
from sgm.inference.flags import Request, refuse_unknown
from sgm.inference.options import SamplingOptions
from sgm.inference.safety import find_filter
from sgm.inference.settings import ModelFiles, resolve
from sgm.inference.specs import SPECS
from tests.judge import write_filter

CONFIG = {"target": "a.Model", "params": {"scale_factor": 0.5}}
SOURCE = {"path": "/photos/a.png", "sha256": "aa"}


@pytest.fixture
def files(tmp_path):
    for name in ("model.yaml", "model.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    spec = SPECS["svd"]
    return ModelFiles(spec, tmp_path / "model.yaml", CONFIG, tmp_path / "model.safetensors")


def describe(files, source=SOURCE, format="mp4", **options):
    asked = SamplingOptions(device="cpu", dtype="float32", **options)
    settings = resolve(asked, files.config, files.spec, (576, 1024))
    described = record.describe_run(files, settings, source, format)
    return record.with_checkpoint(described, "cc")


def test_a_record_survives_json_and_leaves_no_plain_option_open(files):
    made = describe(files, fps=12, videos_per_image=3, elevations_deg=4)
    assert json.loads(json.dumps(made)) == made
    options = made["options"]
    assert (options["height"], options["width"], options["num_frames"]) == (576, 1024, 14)
    assert (options["fps_id"], options["cond_aug"], options["num_steps"]) == (11, 0.02, 25)
    assert options["videos_per_image"] == 1
    assert options["elevations_deg"] == [4.0]
    assert made["sampler_config"]["params"]["guider_config"]["params"]["max_scale"] == 2.5
    assert made["checkpoint"] == {"path": str(files.checkpoint.resolve()), "sha256": "cc"}


def test_describing_changes_nothing(files):
    described = describe(files)
    before = json.dumps(described)
    record.with_checkpoint(described, "other")
    record.repeat_request(Request(), described)
    assert json.dumps(described) == before


def test_what_decides_a_video_is_compared_and_where_it_lay_is_not(files):
    """Caught: a deciding part left out; a path that makes a copy look different."""
    made = describe(files)
    moved = made | {"input": {"path": "/elsewhere/b.png", "sha256": "aa"}, "seconds": 3}
    assert record.identity(moved) == record.identity(made)
    rescaled = replace(files, config={"target": "a.Model", "params": {"scale_factor": 1.0}})
    for other in (
        describe(files, seed=1),
        describe(files, sampler="heun"),
        describe(files, min_guidance=1.2),
        describe(files, format="gif"),
        describe(files, source=SOURCE | {"sha256": "bb"}),
        describe(rescaled),
        record.with_checkpoint(made, "dd"),
        describe(replace(files, spec=SPECS["svd_image_decoder"])),
    ):
        assert record.identity(other) != record.identity(made)


def older(made):
    """As versions wrote it that had no place of a crop, no watermark and no safety filter."""
    new = ("crop_x", "crop_y", "watermark", "safety_filter")
    options = {name: value for name, value in made["options"].items() if name not in new}
    rest = {name: value for name, value in made.items() if name not in new}
    return rest | {"options": options}


def test_an_older_record_is_the_same_run_and_is_repeated(files, tmp_path):
    """Catches old videos made anew by --resume, and --repeat refusing what they left open."""
    made = describe(files, seed=3)
    path = tmp_path / "000000.json"
    path.write_text(json.dumps(older(made)))
    read = record.read_record(path)
    assert record.identity(read) == record.identity(made)
    assert record.identity(read) != record.identity(describe(files, seed=3, crop_x=0.4))
    again = record.repeat_request(Request(), read)
    assert SamplingOptions.from_dict(again.options).to_dict() == made["options"]
    record.refuse_changes(Request(input_path=("x",)), read, files, lambda: "cc")


def test_watermark_and_safety_filter_are_stated(files, tmp_path, monkeypatch):
    monkeypatch.setenv("SGM_CACHE", str(tmp_path / "cache"))
    plain = describe(files)
    assert (plain["watermark"], plain["safety_filter"]) == (False, "off")
    assert record.with_finding(plain, None) == plain
    folder = write_filter(tmp_path / "filter")
    made = describe(files, watermark=True, safety_filter=folder)
    assert made["watermark"] is True
    assert made["safety_filter"]["path"] == made["options"]["safety_filter"] == str(folder)
    digests = sorted(record.sha256_of_file(path) for path in find_filter(folder).files)
    digest = hashlib.sha256("\n".join(digests).encode()).hexdigest()
    assert len(digests) == 3
    assert made["safety_filter"]["sha256"] == digest
    found = record.with_finding(made, True)
    assert found["safety_filter"] == made["safety_filter"] | {"flagged": True}
    assert record.identity(found) == record.identity(made)


def test_the_weights_of_a_safety_filter_decide_and_its_place_does_not(files, tmp_path, monkeypatch):
    monkeypatch.setenv("SGM_CACHE", str(tmp_path / "cache"))
    one, same = write_filter(tmp_path / "a"), write_filter(tmp_path / "b")
    made = describe(files, safety_filter=one)
    assert record.identity(describe(files, safety_filter=same)) == record.identity(made)
    assert record.identity(describe(files)) != record.identity(made)
    asked = Request(input_path=("x",))
    record.refuse_changes(asked, made, files, lambda: "cc")
    write_filter(one, finds=True)
    assert record.identity(describe(files, safety_filter=one)) != record.identity(made)
    with pytest.raises(ValueError, match=r"safety_filter .*a is no longer .* give --safety_filter"):
        record.refuse_changes(asked, made, files, lambda: "cc")
    other = replace(asked, options={"safety_filter": str(one)})
    record.refuse_changes(other, made, files, lambda: "cc")


def test_finding_a_run_hashes_the_weights_only_where_all_else_is_equal(files):
    runs = [(Path("1.mp4"), describe(files, seed=1)), (Path("2.mp4"), describe(files, seed=2))]

    def never():
        raise AssertionError("hashed in vain")

    assert record.find_run(describe(files, seed=3), runs, never) is None
    assert record.find_run(describe(files, seed=2), runs, lambda: "cc") == Path("2.mp4")
    assert record.find_run(describe(files, seed=2), runs, lambda: "dd") is None


def test_finished_runs_are_those_whose_video_is_there(files, tmp_path):
    for number, video in enumerate(["000000.mp4", "gone.mp4"]):
        text = json.dumps(describe(files) | {"video": video})
        (tmp_path / f"{number:06d}.json").write_text(text)
    (tmp_path / "000002.json").write_text("{}")
    (tmp_path / "000000.mp4").touch()
    assert [path.name for path, _ in record.finished_runs(tmp_path)] == ["000000.mp4"]
    assert record.finished_runs(tmp_path / "absent") == []


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", '{"version": 1}', "\x00"])
def test_another_file_is_not_a_record(tmp_path, text):
    path = tmp_path / "some.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"some.json': not the JSON of a video made here"):
        record.read_record(path)


def test_repeating_asks_for_the_same_and_flags_go_before(files):
    made = describe(files, seed=4)
    same = record.repeat_request(Request(), made)
    assert SamplingOptions.from_dict(same.options).to_dict() == made["options"]
    assert same.input_path == ("/photos/a.png",)
    assert (same.version, same.format) == ("svd", "mp4")
    assert (same.config, same.ckpt_path) == (str(files.config_path), str(files.checkpoint))
    asked = Request({"seed": 5}, input_path=("b.png",), version="svd_xt", format="gif")
    other = record.repeat_request(asked, made)
    assert other.options == made["options"] | {"seed": 5}
    assert (other.input_path, other.version, other.format) == (("b.png",), "svd_xt", "gif")
    assert (other.config, other.ckpt_path) == (None, None)  # another model's files


@pytest.mark.parametrize(("fps_id", "then"), [(None, None), (3, 3)])
def test_a_new_frame_rate_conditions_unless_the_run_was_told_otherwise(files, fps_id, then):
    repeated = record.repeat_request(Request({"fps": 20}), describe(files, fps_id=fps_id))
    assert repeated.options["fps"] == 20
    assert repeated.options["fps_id"] == then


def test_changes_are_refused_unless_replaced(files, tmp_path):
    picture = tmp_path / "a.png"
    picture.write_bytes(b"content")
    source = {"path": str(picture), "sha256": hashlib.sha256(b"content").hexdigest()}
    made = describe(files, source=source)
    record.refuse_changes(Request(), made, files, lambda: "cc")
    with pytest.raises(ValueError, match=r"checkpoint .* give --ckpt_path"):
        record.refuse_changes(Request(), made, files, lambda: "dd")
    record.refuse_changes(Request(ckpt_path="x"), made, files, lambda: "dd")
    rescaled = replace(files, config=CONFIG | {"params": {}})
    with pytest.raises(ValueError, match=r"config .* give --config"):
        record.refuse_changes(Request(), made, rescaled, lambda: "cc")
    picture.write_bytes(b"other")
    with pytest.raises(ValueError, match=r"input .*a\.png is no longer .* give --input_path"):
        record.refuse_changes(Request(), made, files, lambda: "cc")


def test_files_that_have_moved_are_named_with_the_flag_that_replaces_them(files, tmp_path):
    """Caught: "no such file" alone, which leaves it open how to repeat the run all the same."""
    places = {"input": "input_path", "config": "config", "checkpoint": "ckpt_path"}
    made = describe(files)
    for name in places:
        (tmp_path / name).write_bytes(b"content")
        made[name]["path"] = str(tmp_path / name)
    record.refuse_missing(Request(), made)
    for name, flag in places.items():
        (tmp_path / name).rename(tmp_path / "moved")
        with pytest.raises(
            ValueError, match=rf"the {name} .*{name} .* no longer there: .* --{flag} "
        ):
            record.refuse_missing(Request(), made)
        record.refuse_missing(Request(**{flag: "other"}), made)
        (tmp_path / "moved").rename(tmp_path / name)
    address = describe(files, source={"path": "http://x/a.png", "sha256": "aa"})
    record.refuse_missing(Request(config="x", ckpt_path="y"), address)


def test_hashing_in_the_background(tmp_path, monkeypatch):
    monkeypatch.setenv("SGM_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "weights"
    path.write_bytes(b"some")
    with record.background_sha256(lambda: [path]) as sha256:
        assert sha256() == hashlib.sha256(b"some").hexdigest()
    other = tmp_path / "more"
    other.write_bytes(b"other")
    digests = sorted(hashlib.sha256(each).hexdigest() for each in (b"some", b"other"))
    for find in (lambda: [path, other], lambda: [other, path]):
        with record.background_sha256(find) as sha256:
            assert sha256() == hashlib.sha256("\n".join(digests).encode()).hexdigest()


@pytest.mark.parametrize(
    ("pictures", "flags", "options", "rest"),
    [
        ((), {"seed": "1e3", "cond_aug": "0.5"}, {"seed": 1000.0, "cond_aug": 0.5}, {}),
        ((), {"seed": "9007199254740993"}, {"seed": 9007199254740993}, {}),
        ((), {"elevations_deg": "[10, -20]"}, {"elevations_deg": (10, -20)}, {}),
        ((), {"elevations_deg": "10"}, {"elevations_deg": (10,)}, {}),
        ((), {"seed": "None", "version": "None"}, {}, {}),
        (("b",), {"input_path": "a"}, {}, {"input_path": ("a", "b")}),
        ((), {"input_path": "a,b"}, {}, {"input_path": ("a", "b")}),
        ((), {"input_path": "http://x/a,b"}, {}, {"input_path": ("http://x/a,b",)}),
        ((), {"resume": "True", "verbose": "False"}, {}, {"resume": True}),
        (
            (),
            {"watermark": "True", "safety_filter": "a,b"},
            {"watermark": True, "safety_filter": "a,b"},
            {},
        ),
    ],
)
def test_texts_become_values(pictures, flags, options, rest):
    assert Request.from_texts(pictures, flags) == Request(options, **rest)


@pytest.mark.parametrize(
    "argument", ["--num-frames=3", "--noresume", "--nowatermark", "-5", "a-b", "x=--y"]
)
def test_known_arguments_pass(argument):
    refuse_unknown([argument])


@pytest.mark.parametrize("argument", ["--nonum_frames", "-n", "--", "-", "---seeds", "--x=--seed"])
def test_unknown_arguments_do_not(argument):
    with pytest.raises(ValueError, match="unknown flag"):
        refuse_unknown([argument])
