"""The README does what it says: its commands run, its table is the options', its links lead on."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from sgm.inference.options import option_table

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"<!-- test: run -->\n```(\w+)\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the checkout, so that nothing is written into the real one; there,
    the model's YAML asks for few steps."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("assets", "checkpoints", "scripts", "sgm"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "configs").mkdir()
    config = OmegaConf.load(ROOT / "configs" / "svd_tiny.yaml")
    config.model.params.sampler_config.params.num_steps = 2
    OmegaConf.save(config, folder / "configs" / "svd_tiny.yaml")
    return folder


def run_shell(line: str) -> None:
    python, script, *arguments = shlex.split(line)
    assert python == "python"
    module = import_module(script.removesuffix(".py").replace("/", "."))
    assert module.main(arguments) == 0, line


def test_commands_run_in_the_order_of_the_page(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkout)
    assert [kind for kind, _ in BLOCKS] == ["sh", "sh", "python", "sh"]
    for kind, text in BLOCKS:
        if kind == "python":
            exec(compile(text, "README.md", "exec"), {})
        else:
            for line in text.strip().splitlines():
                run_shell(line)
    outputs = checkout / "outputs" / "simple_video_sample" / "svd_tiny"
    names = sorted(path.name for path in outputs.iterdir() if path.suffix != ".json")
    # one, a gif, two of a picture, the repeated one, and one by converted weights
    endings = (".mp4", ".gif", ".mp4", ".mp4", ".mp4", ".mp4")
    assert names == [f"{number:06d}{ending}" for number, ending in enumerate(endings)]
    assert (outputs / "000000.mp4").read_bytes() == (outputs / "000004.mp4").read_bytes()
    assert (checkout / "panda.mp4").stat().st_size > 1000


def test_options_table_is_the_options() -> None:
    """Catches an option that was added, renamed or given another default without the README."""
    table = re.search(r"<!-- options -->\n(.*)\n<!-- /options -->", README, re.DOTALL)
    assert table is not None
    assert table[1] == option_table()


PAGES = ["README.md", "CONTRIBUTING.md", "checkpoints/README.md"]
PAGES += [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    missing = [link for link in links if not ((ROOT / page).parent / link).exists()]
    assert not missing


def test_make_targets_of_the_page_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"\bmake ([a-z]+)\b(?! it)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
