"""Every YAML in the tree: its targets resolve with all their parameters, silently.

``tests/data/yaml`` holds files of the kinds that are published elsewhere: with and without sampler,
checkpoint, frames and steps. ``tests/data/keys`` holds the frozen state-dict keys and shapes of the
published architectures; a model must have exactly those, or no published checkpoint would load.
"""

import gzip
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from sgm.util import get_obj_from_str, instantiate_from_config

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests/data"
CONFIGS = {p.relative_to(ROOT / "configs").as_posix(): p for p in ROOT.glob("configs/**/*.yaml")}
PUBLISHED = {
    "svd": "svd",
    "svd_xt": "svd",
    "svd_xt_1_1": "svd",
    "svd_xt_lcm": "svd",
    "svd_image_decoder": "svd_image_decoder",
    "svd_xt_image_decoder": "svd_image_decoder",
    "sv3d_u": "sv3d_u",
    "sv3d_p": "sv3d_p",
}
VARIANTS = {
    "svd_sampling": "svd",
    "svd_inference": "svd",
    "svd_image_decoder_inference": "svd_image_decoder",
    "sv3d_u_inference": "sv3d_u",
    "sv3d_p_sampling": "sv3d_p",
}
UNUSED = ["ln_final", "logit_scale", "positional_embedding", "text_projection", "token_embedding"]
MODELS = [(ROOT / f"configs/{name}.yaml", keys) for name, keys in PUBLISHED.items()]
MODELS += [(DATA / f"yaml/{name}.yaml", keys) for name, keys in VARIANTS.items()]


def nodes(tree: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every mapping with a ``target``, and where it stands in the file."""
    if isinstance(tree, Mapping):
        if "target" in tree:
            yield path, tree
        for key, value in tree.items():
            yield from nodes(value, f"{path}.{key}")
    elif isinstance(tree, Sequence) and not isinstance(tree, str):
        for index, value in enumerate(tree):
            yield from nodes(value, f"{path}[{index}]")


def build(path: Path) -> torch.nn.Module:
    """The file's model without memory and without weights."""
    config = OmegaConf.load(path).model
    config.params.ckpt_path = None
    with torch.device("meta"):
        return instantiate_from_config(config)


def shapes(model: torch.nn.Module) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in model.state_dict().items()}


def frozen_keys(name: str) -> dict[str, list[int]]:
    return json.loads(gzip.decompress((DATA / f"keys/{name}.json.gz").read_bytes()))


def without_unused_text_tower(keys: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """Without what CLIP's text tower leaves behind: published files have it, no model needs it."""
    unused = tuple(f"conditioner.embedders.0.open_clip.model.{name}" for name in UNUSED)
    return {key: value for key, value in keys.items() if not key.startswith(unused)}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_targets_resolve_and_take_their_parameters(name: str):
    # Catches: a class moved or renamed, a parameter dropped from a signature or misspelt in a file.
    for path, node in nodes(OmegaConf.to_container(OmegaConf.load(CONFIGS[name]))):
        signature = inspect.signature(get_obj_from_str(node["target"]))
        try:
            signature.bind_partial(**(node.get("params") or {}))
        except TypeError as error:
            pytest.fail(f"{path}: {node['target']}: {error}")


@pytest.mark.parametrize(("path", "keys"), MODELS, ids=lambda value: getattr(value, "stem", ""))
def test_model_has_the_published_keys(path: Path, keys: str, capfd: pytest.CaptureFixture[str]):
    # Catches: a renamed attribute, embedders in another order, a convolution of another size,
    # a first stage with the wrong decoder, a download, anything printed while building.
    model = build(path)
    assert capfd.readouterr() == ("", "")
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    have, want = (without_unused_text_tower(k) for k in (shapes(model), frozen_keys(keys)))
    assert have == want


def test_every_model_file_is_checked():
    # Catches: a new YAML at the top of configs/ whose keys nobody froze.
    top = {Path(name).stem for name in CONFIGS if "/" not in name}
    assert top - {"svd_tiny"} == set(PUBLISHED)
    assert {path.stem for path in DATA.glob("yaml/*.yaml")} == set(VARIANTS)


def test_bundled_model_has_the_keys_of_its_checkpoint():
    # Catches: svd_tiny.yaml changed after its weights were trained.
    from safetensors import safe_open

    weights = ROOT / "checkpoints/svd_tiny.safetensors"
    if not weights.exists():
        pytest.skip("checkpoints/svd_tiny.safetensors is not there")
    with safe_open(weights, "pt") as file:
        stored = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    assert shapes(build(ROOT / "configs/svd_tiny.yaml")) == stored


def test_file_without_sampler_builds_a_model_without_one():
    # Catches: a default sampler that hides that the file names none.
    assert build(DATA / "yaml/svd_inference.yaml").sampler is None
    assert build(DATA / "yaml/svd_sampling.yaml").sampler is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "sgm.models.diffusion.NoSuchEngine"}, "NoSuchEngine"),
        ({"params": {"network_config": {"params": {"depth": 1}}}}, "VideoUNet.*'depth'"),
    ],
)
def test_mistake_in_a_file_is_named(change: dict[str, Any], message: str):
    # Catches: a parameter that is swallowed, an error that does not say which target it is about.
    config = OmegaConf.merge(OmegaConf.load(DATA / "yaml/svd_inference.yaml").model, change)
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        instantiate_from_config(config)
