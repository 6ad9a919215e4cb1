"""docs/tutorial.md: its commands run as they stand, on generated clips and with few steps."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from tests.footage import pan, scene, write_video

pytestmark = pytest.mark.usefixtures("new_fork_server")

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"<!-- test: run -->\n```sh\n(.*?)```", PAGE, re.DOTALL)
FEW = {  # of each script, so that the page's commands take seconds
    "main.py": ["lightning.trainer.max_steps=2", "data.batch_size=1", "data.workers=0"],
    "scripts/sampling/simple_video_sample.py": ["--num_steps", "1"],
    "scripts/evaluate_clips.py": ["--num_steps", "1"],
}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like the checkout, with a folder of videos."""
    for name in ("assets", "checkpoints", "configs", "scripts", "sgm"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "videos").mkdir()
    for number in range(5):
        shot = pan(scene(number), speed=0.01, frames=32)
        write_video(tmp_path / "videos" / f"{number}.mp4", shot, fps=15)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands_run_in_the_order_of_the_page(checkout: Path) -> None:
    """Catches: an option, a file name or an output that is not what the page says."""
    lines = [line for block in BLOCKS for line in block.strip().splitlines()]
    assert len(lines) == 5
    for line in lines:
        python, script, *arguments = shlex.split(line)
        assert python == "python"
        module = import_module(script.removesuffix(".py").replace("/", "."))
        assert module.main([*arguments, *FEW.get(script, [])]) == 0, line
    for made in ("clips/report", "logs/svd_tiny_lora/lora.safetensors", "outputs/clips/sheet.png"):
        assert (checkout / made).exists(), made
    assert len(list((checkout / "outputs" / "simple_video_sample" / "svd_tiny").glob("*.mp4"))) == 2
