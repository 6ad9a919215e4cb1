"""The widgets of the page in Gradio follow the model: none that it would ignore."""

import asyncio
from contextlib import closing
from pathlib import Path

import gradio as gr
import pytest

from scripts.demo.gradio_widgets import option_inputs
from sgm.inference import specs
from sgm.inference.options import GROUPS
from sgm.serving.limits import Limits
from sgm.serving.studio import Studio

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FOR_VIDEOS = {"motion_bucket_id", "fps_id"}
FOR_ORBITS = {"elevations_deg", "azimuths_deg", "image_frame_ratio"}


@pytest.fixture
def studio(tmp_path, monkeypatch):
    """With two models, of which nothing is read but the YAML."""
    for folder in ("checkpoints", "configs"):
        (tmp_path / folder).mkdir()
    for name in ("svd", "sv3d_u"):
        (tmp_path / "checkpoints" / f"{name}.safetensors").touch()
        (tmp_path / "configs" / f"{name}.yaml").write_text((CONFIGS / f"{name}.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(specs, "ROOT", tmp_path)
    with closing(Studio(Limits())) as studio:
        yield studio


async def lay_out(studio, *names):
    """A page with the widgets; made outside of a loop, it would leave one of its own open."""
    with gr.Blocks() as page:
        version = gr.Dropdown(names, value=names[0])
        return page, option_inputs(studio, version)


@pytest.mark.parametrize(
    ("first", "then", "hidden", "hidden_then"),
    [("svd", "sv3d_u", FOR_ORBITS, FOR_VIDEOS), ("sv3d_u", "svd", FOR_VIDEOS, FOR_ORBITS)],
)
def test_what_a_model_ignores_is_out_of_sight(studio, first, then, hidden, hidden_then):
    """Caught: a slider for motion with SV3D, which is told the camera's angles instead; a panel
    of the camera with SVD; and widgets or hints that stay those of the model before."""
    page, inputs = asyncio.run(lay_out(studio, first, then))
    assert {name for name, widget in inputs.items() if not widget.visible} == hidden
    (change,) = page.fns.values()
    updates = dict(zip(change.outputs, change.fn(then), strict=True))
    now = {name: updates[widget] for name, widget in inputs.items()}
    assert {name for name, update in now.items() if not update["visible"]} == hidden_then
    camera = [each for widget, each in updates.items() if widget.label == GROUPS["sv3d"]]
    assert [update["visible"] for update in camera] == [then == "sv3d_u"]
    assert now["num_frames"]["placeholder"] == {"svd": "14", "sv3d_u": "21"}[then]
