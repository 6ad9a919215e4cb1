"""Helpers: what they build, and what they say when they cannot."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from sgm.util import (
    append_dims,
    counted,
    default,
    get_obj_from_str,
    instantiate_from_config,
    refuse_unknown,
)


@pytest.mark.parametrize("value", [0, False, "", 2.5])
def test_default_replaces_none_alone(value):
    # Catches: `value or fallback`, which would replace 0.
    assert default(value, "fallback") is value
    assert default(None, "fallback") == "fallback"


def test_append_dims_broadcasts_over_rows():
    # Catches: dimensions put in front, a copy instead of a view.
    x = torch.arange(3.0)
    out = append_dims(x, 4)
    assert out.shape == (3, 1, 1, 1)
    assert out.data_ptr() == x.data_ptr()
    assert append_dims(x, 1).shape == (3,)
    with pytest.raises(ValueError, match="at most 1 dimensions, got 2"):
        append_dims(torch.zeros(2, 2), 1)


def test_counting_names_a_few_and_each_once():
    assert counted([], "key", "missing") == ""
    assert counted(["a", "a"], "key", "missing") == "1 key missing (a)"
    assert counted(iter("abcd"), "key", "missing") == "4 keys missing (a, b, c, ...)"


def test_dotted_paths_name_objects():
    assert get_obj_from_str("torch.nn.Identity") is torch.nn.Identity
    assert get_obj_from_str("sgm.util.default") is default


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("Identity", "expected a dotted path .* got 'Identity'"),
        ("torch.nn.Identify", "unknown target 'torch.nn.Identify': 'torch.nn' has no 'Identify'"),
        ("no_such.package.Thing", "unknown target .*: there is no module 'no_such'"),
        ("sgm.modules.difusion.Thing", "there is no module 'sgm.modules.difusion'"),
    ],
)
def test_unknown_paths_are_named(path: str, message: str):
    with pytest.raises(ValueError, match=message):
        get_obj_from_str(path)


def test_a_missing_dependency_is_not_an_unknown_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Catches: "unknown target" for a module that is there and lacks a package of its own.
    (tmp_path / "needs_more.py").write_text("import no_such_dependency\nThing = dict\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        get_obj_from_str("needs_more.Thing")


def test_configs_build_objects():
    config = {"target": "torch.nn.Linear", "params": {"in_features": 2, "out_features": 3}}
    for form in (config, OmegaConf.create(config)):
        assert instantiate_from_config(form).weight.shape == (3, 2)
        assert instantiate_from_config(form, bias=False).bias is None
        assert instantiate_from_config(form, out_features=5).out_features == 5
    assert config["params"] == {"in_features": 2, "out_features": 3}
    for params in ({}, {"params": None}):
        assert isinstance(
            instantiate_from_config({"target": "torch.nn.Identity"} | params), torch.nn.Identity
        )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"parms": {}, "class": "x"}, r"the key 'target', got the keys \['class', 'parms'\]"),
        ({"target": "torch.nn.Lineal"}, "'torch.nn' has no 'Lineal'"),
        ({"target": "torch.nn.Linear", "params": {"in_features": 2}}, "torch.nn.Linear: .*missing"),
        ({"target": "torch.nn.ReLU", "params": {"depth": 2}}, "torch.nn.ReLU: .*'depth'"),
    ],
)
def test_mistakes_in_configs_are_named(config: dict, message: str):
    with pytest.raises(ValueError, match=message):
        instantiate_from_config(config)


class Owner:
    def __init__(self, num_heads: int = 1):
        self.num_heads = num_heads


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("num_head", ": did you mean 'num_heads'?"),
        ("dimension", ": did you mean 'dimensions'?"),
        ("colour", ""),
    ],
)
def test_unknown_parameters_are_named(name: str, hint: str):
    # Catches: a misspelt parameter that is swallowed; a hint that forgets the owner's own names.
    with pytest.raises(ValueError, match=f"^Owner has no parameter '{name}'{re.escape(hint)}$"):
        refuse_unknown(Owner(), {"dimensions": 2, name: 1}, {"dimensions"})
    refuse_unknown(Owner(), {"dimensions": 3}, {"dimensions"})


def broken(size: int) -> None:
    len(size)  # type: ignore[arg-type]


def test_an_error_inside_a_constructor_stays_what_it_is(monkeypatch: pytest.MonkeyPatch):
    # Catches: a bug in a constructor reported as a mistake in the YAML.
    monkeypatch.setattr("sgm.util.broken", broken, raising=False)
    with pytest.raises(TypeError, match="has no len"):
        instantiate_from_config({"target": "sgm.util.broken", "params": {"size": 1}})


def test_helpers_need_torch_alone():
    # Catches: omegaconf, einops or a network imported by the lowest layer.
    code = "import sys, sgm.util; print(sorted(m for m in sys.modules if m.startswith('sgm.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['sgm.util']"
