"""The list of models on a page, and the facts in it."""

import re
from pathlib import Path

import pytest

from sgm.inference import specs
from sgm.inference.specs import SPECS
from sgm.serving.models import default_offer, list_offers

README = Path(__file__).parents[2] / "checkpoints" / "README.md"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory without weights, the only place where they are looked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(specs, "ROOT", tmp_path)
    monkeypatch.setattr(specs, "PACKAGE", tmp_path)
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def test_models_with_weights_come_first_in_the_order_of_the_table(place):
    for name in ("svd_tiny", "sv3d_u"):
        (place / f"{name}.safetensors").touch()
    offers = list_offers()
    names = list(SPECS)
    assert [offer.spec.name for offer in offers[:2]] == ["svd_tiny", "sv3d_u"]
    rest = [name for name in names if name not in ("svd_tiny", "sv3d_u")]
    assert [offer.spec.name for offer in offers[2:]] == rest
    assert [offer.present for offer in offers] == [True, True] + [False] * len(rest)


def test_the_bundled_model_is_the_default_where_it_is(place):
    assert default_offer(list_offers()) is None
    (place / "svd.safetensors").touch()
    assert default_offer(list_offers()).spec.name == "svd"
    (place / "svd_tiny.safetensors").touch()
    assert default_offer(list_offers()).spec.name == "svd_tiny"
    assert default_offer(list_offers(["svd", "svd_xt"])).spec.name == "svd"


def test_each_model_has_a_command_and_a_licence():
    for offer in list_offers():
        published = offer.spec.repository is not None
        assert offer.command == published * f"python scripts/download.py {offer.spec.name}"
        assert "stability.ai/license" in offer.licence if published else "MIT" in offer.licence
    lcm = next(offer for offer in list_offers() if offer.spec.base)
    assert lcm.spec.base in lcm.licence


def test_sizes_are_those_of_the_readme():
    # Catches: a size that is told in two ways, a model that is missing in one of the two.
    row = r"^\| `(\w+)\.safetensors` \|.*?\| ([\d.]+ [GM]) \| (\S+) / (\S+) GB"
    rows = re.findall(row, readme(), re.MULTILINE)
    assert {name for name, *_ in rows} == SPECS.keys()
    sizes = {offer.spec.name: offer.size for offer in list_offers()}
    for name, parameters, single, half in rows:
        count = SPECS[name].parameters
        unit = {"G": 1e9, "M": 1e6}[parameters[-1]]
        assert f"{count / unit:.{2 if unit == 1e9 else 0}f}" == parameters[:-2]
        assert name == "svd_tiny" or f"{4 * count / 1e9:.2f}" == single
        assert f"{2 * count / 1e9:.2f}" == half
        assert sizes[name] == (f"{half} GB" if count > 5e8 else "38 MB")


def test_repositories_are_those_of_the_readme():
    for name, spec in SPECS.items():
        row = re.search(rf"^\| `{name}\.safetensors` .*$", readme(), re.MULTILINE)[0]
        assert (f"`{spec.repository}`" if spec.repository else "here") in row


def readme():
    return README.read_text(encoding="utf-8")
