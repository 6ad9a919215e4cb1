"""The page with the real studio, on the random one-second model; its browser is Streamlit's own.

A real browser drives it in tests/browser.
"""

import io
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file
from streamlit.testing.v1 import AppTest

from scripts.demo.page.session import open_studio
from scripts.sampling.simple_video_sample import main as command_line
from sgm.inference import specs
from sgm.inference.options import option_fields
from tests.tiny import tiny_config, write_tiny_checkpoint

PAGE = Path(__file__).parents[2] / "scripts/demo/video_sampling.py"


@pytest.fixture(scope="module", autouse=True)
def main_module():
    """Streamlit makes the page the main module, which processes of later tests would each import
    before they begin: ten seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "__main__", sys.modules["__main__"])
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


def furnish(folder, patch):
    """Make a folder the working directory, the only place where models and pictures are."""
    patch.chdir(folder)
    patch.setattr(specs, "ROOT", folder)
    for name in ("checkpoints", "configs", "assets"):
        (folder / name).mkdir()
    (folder / "assets" / "sample.jpg").write_bytes(picture(60, 90, "jpeg"))


def add_model(place, weights, name):
    (place / "checkpoints" / f"{name}.safetensors").symlink_to(weights)
    OmegaConf.save(tiny_config(), place / "configs" / f"{name}.yaml")


@pytest.fixture(scope="module")
def home(tmp_path_factory, weights):
    """Where one server, without a settings file, serves the visitors of most tests."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        furnish(folder, patch)
        patch.setattr(sys, "argv", [str(PAGE)])
        add_model(folder, weights, "svd_tiny")
        studio = open_studio(None)
        yield folder
        studio.close()


@pytest.fixture
def page(home):
    return visit()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Another place, with no weights, for a server of its own."""
    furnish(tmp_path, monkeypatch)
    return tmp_path


@pytest.fixture
def serve(place, monkeypatch):
    """Start a server there with the operator's settings."""
    studios = []

    def start(**settings):
        file = place / f"settings{len(studios)}.yaml"
        OmegaConf.save(OmegaConf.create(settings), file)
        monkeypatch.setattr(sys, "argv", [str(PAGE), "--settings", str(file)])
        studios.append(open_studio(file))

    yield start
    for studio in studios:
        studio.close()


def visit(**query):
    page = AppTest.from_file(str(PAGE), default_timeout=60)
    for name, value in query.items():
        page.query_params[name] = value
    return page.run()


def picture(height, width, kind="png", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def upload(page, *files):
    page.button_group("source").set_value("upload").run()
    named = [(f"../../{n}.png", data, "image/png") for n, data in enumerate(files)]
    page.file_uploader("files").set_value(named)
    return page.run()


def widgets_of(page):
    kinds = (
        *(page.number_input, page.slider, page.selectbox, page.text_input),
        *(page.color_picker, page.toggle),
    )
    return {widget.key: widget for kind in kinds for widget in kind}


def press(page, key):
    page.button(key).click().run()
    return finish(page)


def finish(page):
    """Wait until nothing of this page waits or runs."""
    for ticket in list(page.session_state["tickets"]):
        assert ticket.wait(60)
    page.run()
    assert not page.exception
    return page


def runs(page):
    """What the page's visitor has made, oldest first."""
    return open_studio(None).runs(page.session_state["visitor"])[::-1]


def errors(page):
    assert not page.exception
    assert all("\n" not in error.value for error in page.error)
    return [error.value for error in page.error]


def test_page_and_command_line_give_the_same_file(home, page):
    # Catches: a default of the page's own (seed, motion, size, background), another path, a crop.
    assert not errors(press(page, "make"))
    (run,) = runs(page)
    assert command_line(["assets/sample.jpg", "--output_folder", "same"]) == 0
    assert run.file("mp4") == (home / "same" / "000000.mp4").read_bytes()


def test_every_widget_reaches_the_command_lines_file(home, page):
    # Catches: a widget whose value is dropped, goes to another option, or is changed on its way.
    given = picture(80, 50)
    upload(page, given)
    asked = {
        "num_steps": 3, "height": 72, "width": 64, "seed": 5, "fps": 9, "motion_bucket_id": 200,
        "min_guidance": 1.5, "max_guidance": 4.0, "fit": "contain", "background": "#336699",
        "videos_per_image": 2, "guidance_shape": "triangle", "sampler": "heun", "cond_aug": 0.125,
        "fps_id": 20, "decoding_t": 1, "dtype": "float32", "optimize": "none",
        "memory": "high",
    }  # fmt: skip
    for name, value in asked.items():
        widgets_of(page)[name].set_value(value)
    page.slider("length").set_value(2).run()
    page.slider("crop_x").set_value(0.25).run()
    assert widgets_of(page).keys() == {*asked, "length", "crop_x", "version", "watermark"}
    assert not errors(press(page, "make"))
    first, second = runs(page)
    (home / "given.png").write_bytes(given)
    flags = asked | {"num_frames": 2, "crop_x": 0.25}
    words = [f"--{name}={value}" for name, value in flags.items()]
    assert command_line(["given.png", "--output_folder=again", *words]) == 0
    for number, run in enumerate((first, second)):
        assert run.file("mp4") == (home / "again" / f"{number:06d}.mp4").read_bytes()
        assert run.frames().shape == (2, 72, 64, 3)


def test_widgets_are_described_by_the_options(page):
    # Catches: a help, range or default that is written a second time.
    widgets = widgets_of(page) | {"num_frames": page.slider("length")}
    for option in option_fields("basic"):
        meta = option.metadata
        if option.name == "crop_y":  # there is nothing to move upright here
            continue
        found = widgets[option.name]
        assert meta["help"] in found.proto.help
        if meta["kind"] in ("integer", "number") and option.name not in allowed():
            assert (found.min, found.max) == (meta["min"], min(meta["max"], 2**53 - 1))
            assert found.value == option.default
    # The YAML's frames and steps, the row's size: what happens where the user sets nothing.
    assert page.slider("length").value == 4
    placeholders = {w.key: w.proto.placeholder for w in page.number_input}
    usual = {"num_steps": "2", "height": "64", "fps_id": "fps - 1"}
    assert usual.items() <= placeholders.items()


def allowed():
    """What an operator's file limits."""
    return ("num_frames", "num_steps", "videos_per_image")


def test_quality_sets_the_steps_and_shows_what_they_are(page):
    # Catches: a quality that the run does not get, or that stays when the steps are typed.
    quality = page.button_group("quality")
    assert (quality.value, page.number_input("num_steps").value) == ("Usual", None)
    quality.set_value("Best").run()
    assert page.number_input("num_steps").value == 4
    page.number_input("num_steps").set_value(7).run()
    assert page.button_group("quality").value is None
    page.button_group("quality").set_value("Usual").run()
    assert page.number_input("num_steps").value is None


def test_a_link_and_the_page_it_opens_say_the_same(page):
    # Catches: a value that is lost on the way into the address or out of it.
    link = {
        "version": "svd_tiny", "num_frames": "3", "seed": "9", "motion_bucket_id": "31",
        "background": "#112233", "fit": "contain", "picture": "red-panda",
    }  # fmt: skip
    opened = visit(**link)
    assert not errors(opened)
    assert not opened.warning
    assert opened.slider("length").value == 3
    assert opened.number_input("seed").value == 9
    assert dict(opened.query_params) == link
    opened.slider("motion_bucket_id").set_value(127).run()
    assert "motion_bucket_id" not in opened.query_params


def test_values_are_sent_until_the_browser_has_seen_them(page):
    # Catches: a quick click that leaves sliders at 0, as the browser missed the first drawing.
    opened = visit(motion_bucket_id="100", num_steps="3")
    opened.button_group("source").set_value("upload").run()
    assert opened.slider("motion_bucket_id").proto.set_value
    assert opened.number_input("num_steps").proto.set_value
    opened.slider("motion_bucket_id").set_value(90).run()
    opened.button_group("source").set_value("sample").run()
    assert not opened.slider("motion_bucket_id").proto.set_value
    assert opened.number_input("num_steps").proto.value == 3


def test_what_a_link_may_not_say_is_left_out(page):
    # Catches: a path or a device by link, a refused value that ends the page or passes silently.
    opened = visit(
        version="svd_xt", seed="many", num_frames="500", lora="/etc/passwd", picture="../../x",
        device="abacus", safety_filter="/etc",
    )  # fmt: skip
    assert not errors(opened)
    texts = " ".join(warning.value for warning in opened.warning)
    assert "the weights of svd_xt are not here: python scripts/download.py svd_xt" in texts
    assert "seed must be an integer" in texts
    assert "num_frames is 1 to 100 on this page, got 500" in texts
    assert opened.selectbox("version").value == "svd_tiny"
    assert set(opened.query_params) == {"version", "picture"}
    assert opened.query_params["picture"] == "red-panda"


def test_the_crop_is_what_the_slider_says(page):
    # Catches: a slider that moves the preview alone, or the wrong axis.
    left, right = np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 255, np.uint8)
    file = io.BytesIO()
    Image.fromarray(np.concatenate([left, right], 1)).save(file, "png")
    upload(page, file.getvalue())
    assert "crop_y" not in widgets_of(page)
    page.slider("crop_x").set_value(0.0).run()
    press(page, "make")
    page.slider("crop_x").set_value(1.0).run()
    press(page, "make")
    assert [run.record["options"]["crop_x"] for run in runs(page)] == [0.0, 1.0]


def test_several_pictures_give_several_videos(page):
    # Catches: only the first or last of them made, or shown.
    upload(page, picture(64, 64, seed=1), picture(64, 64, seed=2))
    press(page, "make")
    assert [run.picture for run in runs(page)] == [
        picture(64, 64, seed=1),
        picture(64, 64, seed=2),
    ]
    assert [button.label for button in page.button].count("Show") == 2


def test_result_can_be_downloaded_and_stays_while_options_change(page):
    # Catches: a download that is not the video shown, a result lost at the next rerun.
    press(page, "make").slider("fps").set_value(12).run()
    (run,) = runs(page)
    with av.open(io.BytesIO(run.file("mp4"))) as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.width, stream.height) == (4, 64, 64)
        assert stream.average_rate == 7
    assert [b.label for b in page.download_button] == ["MP4", "GIF", "WEBP", "PNG (zip)"]
    assert page.get("video")
    page.slider(f"frame_{run.token}").set_value(3).run()
    assert not errors(page)


def test_use_these_settings_makes_the_same_video_again(page):
    # Catches: a setting or the picture that is not taken over, defaults that become fixed values.
    upload(page, picture(64, 100))
    page.slider("motion_bucket_id").set_value(20)
    page.number_input("width").set_value(96)
    page.number_input("seed").set_value(5).run()
    press(page, "make")
    page.slider("motion_bucket_id").set_value(99)
    page.number_input("seed").set_value(6)
    page.number_input("width").set_value(None)
    page.button_group("source").set_value("sample").run()
    press(page, "make")
    for name in ("seed", "width"):
        assert runs(page)[1].record["options"][name] != runs(page)[0].record["options"][name]
    page.button("show_1").click().run()
    page.button("use_settings").click().run()
    assert page.number_input("cond_aug").value is None
    press(page, "make")
    first, _, again = runs(page)
    assert again.file("mp4") == first.file("mp4")


def test_same_seed_more_motion_runs_at_once(page):
    # Catches: a new seed, the old motion, another picture.
    press(page, "make")
    press(page, "more_motion")
    first, second = (run.record["options"] for run in runs(page))
    assert second == first | {"motion_bucket_id": 167}
    assert page.slider("motion_bucket_id").value == 167
    page.button_group("view").set_value("compare").run()
    table = page.table[-1].value
    assert set(table["setting"]) - {"seconds"} == {"motion_bucket_id"}


def test_cancel_ends_the_run_and_frees_the_model(page):
    # Catches: a cancel that waits for the end, that leaves a video, or a queue that is stuck.
    page.slider("length").set_value(100)
    page.number_input("num_steps").set_value(100).run()
    page.button("make").click().run()
    while page.session_state["tickets"][0].progress is None:
        page.run()
    began = time.monotonic()
    page.button("cancel_0").click().run()
    finish(page)
    assert time.monotonic() - began < 20  # the run would take minutes
    assert not runs(page)
    assert not errors(page)
    page.slider("length").set_value(2)
    page.number_input("num_steps").set_value(1).run()
    press(page, "make")
    assert len(runs(page)) == 1


def test_waiting_orders_show_their_place_and_too_many_are_refused(page):
    # Catches: a queue without positions, one visitor who takes all places.
    page.slider("length").set_value(100)
    page.number_input("num_steps").set_value(100).run()
    for _ in range(5):
        page.button("make").click().run()
    texts = [bar.proto.text for bar in page.get("progress")]
    assert texts[-1] == "Waiting: number 3 in the queue"
    assert any(text.startswith("3 of your orders wait already") for text in errors(page))
    for ticket in page.session_state["tickets"]:
        ticket.cancel()
    finish(page)


def test_other_visitors_see_nothing_unless_the_operator_allows_it(place, weights, serve):
    # Catches: one visitor's videos in another's history.
    add_model(place, weights, "svd_tiny")
    serve()
    press(visit(), "make")
    stranger = visit()
    assert "show_0" not in {button.key for button in stranger.button}
    serve(share_outputs=True)
    stranger = visit()
    assert "show_0" in {button.key for button in stranger.button}


def test_operator_limits_what_the_page_offers(place, weights, serve):
    # Catches: a limit that the page does not know, an operator's watermark that can be set off.
    for name in ("svd_tiny", "svd"):
        add_model(place, weights, name)
    serve(models=["svd_tiny"], max_frames=3, max_steps=5, max_videos=1, watermark=False)
    page = visit()
    assert page.selectbox("version").options == ["svd_tiny"]
    assert (page.slider("length").value, page.slider("length").max) == (3, 3)
    assert page.number_input("num_steps").max == 5
    assert "watermark" not in widgets_of(page)
    page.number_input("height").set_value(8192).run()
    assert errors(page)[0].startswith("height x width must be at most 1048576 here")
    assert page.button("make").disabled


def test_no_path_and_no_device_is_offered_or_shown(home, page):
    # Catches: a widget for a file or device of the host, a place of it in the table of settings.
    press(page, "make")
    assert not {"lora", "safety_filter", "output_folder", "device"} & widgets_of(page).keys()
    shown = " ".join(str(table.value) for table in page.table)
    shown += " ".join(text.value for text in (*page.caption, *page.markdown, *page.code))
    assert str(home) not in shown


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("height", 65, "mp4 needs an even height and width, got 65x64; the nearest is 64x64"),
        ("min_guidance", 50.0, "min_guidance must not exceed max_guidance"),
        ("watermark", True, "watermark needs frames of 65536 pixels or more"),
    ],
)
def test_refused_option_is_one_line(page, name, value, message):
    # Catches: a traceback on the page, an odd size found out after sampling.
    widgets_of(page)[name].set_value(value).run()
    if not page.button("make").disabled:
        press(page, "make")
    assert errors(page)[0].startswith(message)
    assert not runs(page)


def test_bad_pictures_are_one_line_and_keep_the_options(page):
    # Catches: a text called .png half used, a bomb decoded, widgets that forget their values.
    page.number_input("seed").set_value(7).run()
    upload(page, b"no picture")
    assert errors(page) == ["the given picture: not a jpeg, png, webp, gif, bmp or tiff picture"]
    assert page.button("make").disabled
    upload(page, picture(64, 64), bomb())
    assert len(errors(page)) == 1
    assert "picture 2: the picture is larger than the 60 megapixels allowed here" in errors(page)[0]
    assert page.button("make").disabled
    assert page.number_input("seed").value == 7


def bomb():
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "png")
    return file.getvalue()


def test_damaged_weights_are_one_line(place, weights, serve):
    # Catches: a traceback, or an endless wait, where the run itself fails.
    add_model(place, weights, "svd_tiny")
    file = place / "checkpoints" / "svd_tiny.safetensors"
    file.unlink()
    save_file({"no": torch.zeros(1)}, file)
    serve()
    (error,) = errors(press(visit(), "make"))
    assert "svd_tiny.safetensors" in error


def test_model_is_unloaded_and_loaded_again(page):
    # Catches: a button without effect, a run that needs a model in memory.
    studio = open_studio(None)
    press(page, "make")
    assert studio.loaded == "svd_tiny"
    page.button("unload").click().run()
    assert studio.loaded is None
    assert not errors(press(page, "make"))


def test_models_that_are_not_here_are_listed_with_what_gets_them(page):
    # Catches: a model offered that cannot run, one that nobody can find out how to get.
    assert page.selectbox("version").options == ["svd_tiny"]
    assert "python scripts/download.py svd_xt" in [code.value for code in page.code]


def test_sv3d_options_appear_for_orbit_models_alone(place, weights, serve):
    # Catches: angles offered where they mean nothing, or hidden where they are needed.
    for name in ("svd_tiny", "sv3d_u"):
        add_model(place, weights, name)
    serve()
    page = visit()
    assert "azimuths_deg" not in widgets_of(page)
    assert "motion_bucket_id" in widgets_of(page)
    page.selectbox("version").set_value("sv3d_u").run()
    assert not {"motion_bucket_id", "fps_id"} & widgets_of(page).keys()
    page.text_input("azimuths_deg").set_value("0, 90, 180").run()
    assert "azimuths_deg must hold 4 angles, got 3" in errors(page)
    page.text_input("azimuths_deg").set_value("0, north").run()
    assert any(e.startswith("azimuths_deg must be a number or a list") for e in errors(page))
    page.text_input("azimuths_deg").set_value("").run()
    page.button_group("path").set_value("Up and down").run()
    assert page.text_input("elevations_deg").value == "20, 0, -20, 0"
    # Catches: a path of so many angles that the video, now shorter, has no frames for.
    page.slider("length").set_value(2).run()
    assert page.text_input("elevations_deg").value == "0, 0"


def test_curves_are_drawn_for_what_will_run(page):
    # Catches: curves of the defaults, an error of the chart.
    page.number_input("num_steps").set_value(3)
    page.button_group("view").set_value("curves").run()
    assert not errors(page)
    noise, scales = page.get("vega_lite_chart")
    assert noise.proto.spec.count('"noise level":') == 3
    assert scales.proto.spec.count('"guidance":') == 4


def test_a_wrong_settings_file_is_said_and_opens_nothing(place, monkeypatch):
    # Catches: a page that is open with the defaults where the operator mistyped a limit.
    (place / "limits.yaml").write_text("max_step: 5\n")
    monkeypatch.setattr(sys, "argv", [str(PAGE), "--settings", str(place / "limits.yaml")])
    page = visit()
    assert "unknown entry 'max_step'" in errors(page)[0]
    assert not page.button


def test_without_weights_the_page_says_what_to_do(serve):
    # Catches: an empty list of models.
    serve()
    page = visit()
    assert errors(page)[0].startswith("no weights found: put one of svd_xt")
    assert page.button("make").disabled
