"""The page with the real pipeline, on the random one-second model."""

import io
import os
from pathlib import Path

import av
import numpy as np
import pytest
import streamlit as st
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file
from streamlit.testing.v1 import AppTest

from sgm.inference import specs
from sgm.inference.options import SamplingOptions, option_fields
from sgm.inference.pipeline import VideoPipeline
from tests.tiny import tiny_config, write_tiny_checkpoint

PAGE = Path(__file__).parents[2] / "scripts/demo/video_sampling.py"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory, the only place where models are looked for, with no weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(specs, "ROOT", tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "configs").mkdir()
    (tmp_path / "assets").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "assets" / "sample.jpg")
    st.cache_resource.clear()
    return tmp_path


def add_model(place, weights, name):
    (place / "checkpoints" / f"{name}.safetensors").symlink_to(weights)
    OmegaConf.save(tiny_config(), place / "configs" / f"{name}.yaml")


@pytest.fixture
def page(place, weights):
    add_model(place, weights, "svd_tiny")
    return AppTest.from_file(str(PAGE), default_timeout=120).run()


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def widgets_of(page):
    kinds = (page.number_input, page.slider, page.selectbox, page.text_input, page.color_picker)
    return {widget.key: widget for kind in kinds for widget in kind}


def make(page):
    page.button[0].click().run()
    assert not page.exception
    return page


def videos(page):
    return [video for _, video, _ in page.session_state["results"]]


def test_page_gives_the_frames_of_the_pipeline_with_its_defaults(page):
    # Catches: a default of the page's own (seed, motion, size, background colour), another path.
    made = make(page)
    assert not made.error
    expected = VideoPipeline.from_spec("svd_tiny")("assets/sample.jpg")
    (video,) = videos(made)
    np.testing.assert_array_equal(video.frames, expected.frames)


def test_every_widget_reaches_the_frames(page):
    # Catches: a widget whose value is dropped, or goes to another option.
    pixels = np.random.default_rng(1).integers(0, 255, (80, 50, 4), dtype=np.uint8)
    page.file_uploader("picture").set_value(("upright.png", png(pixels), "image/png"))
    asked = {
        "num_frames": 2, "num_steps": 3, "height": 72, "width": 64, "seed": 5, "fps": 9,
        "motion_bucket_id": 200, "min_guidance": 1.5, "max_guidance": 4.0, "fit": "contain",
        "background": "#336699", "videos_per_image": 2, "guidance_shape": "triangle",
        "sampler": "heun", "cond_aug": 0.125, "fps_id": 20, "decoding_t": 1, "dtype": "float32",
        "device": "cpu", "optimize": "none", "memory": "high",
    }  # fmt: skip
    widgets = widgets_of(page)
    assert asked.keys() == widgets.keys() - {"version"}
    for name, value in asked.items():
        widgets[name].set_value(value)
    made = make(page)
    assert not made.error
    how = {"dtype": "float32", "device": "cpu", "optimize": "none"}
    pipeline = VideoPipeline.from_spec("svd_tiny", **how)
    expected = pipeline(png(pixels), SamplingOptions(**asked))
    for got, want in zip(videos(made), expected, strict=True):
        np.testing.assert_array_equal(got.frames, want.frames)
        assert got.fps == want.fps


def test_video_can_be_downloaded_and_stays_while_options_change(page):
    # Catches: a download that is not the video shown, a result lost at the next rerun.
    make(page).slider("fps").set_value(12).run()
    ((name, video, file),) = page.session_state["results"]
    assert name == "svd_tiny_23.mp4"
    with av.open(io.BytesIO(file)) as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.width, stream.height) == (4, 64, 64)
        assert stream.average_rate == video.fps == 7
    assert [button.label for button in page.download_button] == ["Download"]
    assert page.get("video")


def test_widgets_are_described_by_the_options(page):
    # Catches: a help, range or default that is written a second time.
    for option in option_fields("basic"):
        found = widgets_of(page)[option.name]
        assert option.metadata["help"] in found.proto.help
        if option.metadata["kind"] in ("integer", "number"):
            assert found.min == option.metadata["min"]
            assert found.max == min(option.metadata["max"], 2**53 - 1)
            assert found.value == option.default
    # The YAML's frames and steps, the row's size: what happens where the user sets nothing.
    placeholders = {w.key: w.proto.placeholder for w in page.number_input}
    usual = {"num_frames": "4", "num_steps": "2", "height": "64", "fps_id": "fps - 1"}
    assert usual.items() <= placeholders.items()


def test_sv3d_options_appear_for_orbit_models_alone(place, weights, page):
    # Catches: angles offered where they mean nothing, or hidden where they are needed.
    assert "azimuths_deg" not in {w.key for w in page.text_input}
    add_model(place, weights, "sv3d_u")
    page.run()
    page.selectbox("version").set_value("sv3d_u").run()
    page.text_input("azimuths_deg").set_value("0, 90, 180")
    assert [e.value for e in make(page).error] == ["azimuths_deg must hold 4 angles, got 3"]
    page.text_input("azimuths_deg").set_value("0, north")
    (error,) = make(page).error
    assert error.value.startswith("azimuths_deg must be a number or a list of them")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("height", 65, "mp4 needs an even height and width, got 65x64; the nearest is 64x64"),
        ("min_guidance", 50.0, "min_guidance must not exceed max_guidance"),
        ("device", "abacus", "device 'abacus' is not available here"),
        ("device", "my gpu", "device must be a device such as cpu"),
    ],
)
def test_refused_option_is_one_line(page, name, value, message):
    # Catches: a traceback on the page, an odd size found out after sampling.
    widgets_of(page)[name].set_value(value)
    (error,) = make(page).error
    assert error.value.startswith(message)
    assert "\n" not in error.value
    assert not page.session_state["results"]


def test_bad_picture_is_one_line_and_keeps_the_options(page):
    # Catches: a text called .png half used, widgets that forget their values.
    page.number_input("seed").set_value(7)
    page.file_uploader("picture").set_value(("notes.png", b"no picture", "image/png")).run()
    assert [e.value for e in page.error] == [
        "picture 'notes.png': not a jpeg, png, webp, gif, bmp or tiff picture"
    ]
    assert not page.exception
    assert page.button[0].disabled
    assert page.number_input("seed").value == 7


def test_model_is_loaded_once(page):
    # Catches: weights read again at every press of the button; a replaced file that is not.
    weights = Path("checkpoints/svd_tiny.safetensors")
    make(page)
    modified = weights.stat().st_mtime_ns
    weights.unlink()
    save_file({"no": torch.zeros(1)}, weights)
    os.utime(weights, ns=(modified, modified))
    page.number_input("seed").set_value(24)
    assert not make(page).error
    os.utime(weights, ns=(modified, modified + 1))
    assert make(page).error


def test_a_long_run_is_announced_before_its_model_is_loaded(page, monkeypatch):
    # Catches: an estimate that comes when loading, the first long wait, is over or has failed.
    monkeypatch.setattr("sgm.inference.estimate.LONG", 1e-9)
    weights = Path("checkpoints/svd_tiny.safetensors")
    weights.unlink()
    save_file({"no": torch.zeros(1)}, weights)
    made = make(page)
    assert made.error
    shown = [text.value for text in made.markdown]
    assert any(text.startswith("svd_tiny on this ") and "a video" in text for text in shown)


def test_a_wrong_type_in_the_yaml_is_one_line(page):
    path = Path("configs/svd_tiny.yaml")
    OmegaConf.save(tiny_config(**{"network_config.params.num_res_blocks": "some"}), path)
    (error,) = make(page).error
    assert error.value.startswith("svd_tiny.yaml: model.params.network_config.params.num_res_blo")


def test_without_weights_the_page_says_what_to_do(place):
    # Catches: an empty list of models.
    page = AppTest.from_file(str(PAGE), default_timeout=60).run()
    assert not page.exception
    assert [e.value[:35] for e in page.error] == ["no weights found: put one of svd_xt"]
    assert not page.button
