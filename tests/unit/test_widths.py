"""Parts of a model that do not fit together are refused when it is built, by the keys of the YAML.

That published files fit is in tests/contracts/test_yaml.py.
"""

import pytest
import torch
from torch import nn

from sgm.models.diffusion import DiffusionEngine
from sgm.models.widths import check_widths
from tests.tiny import tiny_config

EMBEDDERS = "conditioner_config.params.emb_models"


def build(**changes):
    return DiffusionEngine.without_weights(tiny_config(**changes).model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {f"{EMBEDDERS}.4.params.outdim": 32},
            r"adm_in_channels: expected 64 \(16 of fps_id \+ 16 of motion_bucket_id \+ "
            r"32 of cond_aug\), got 48: change it, or ",
        ),
        (
            {"network_config.params.context_dim": 1024},
            r"context_dim: expected 24 \(24 of cond_frames_without_noise\), got 1024: ",
        ),
        ({"network_config.params.context_dim": None}, "context_dim: expected 24 .*, got None: "),
        (
            {"network_config.params.in_channels": 9},
            r"in_channels: expected 8 \(4 of latents \+ 4 of cond_frames\), got 9: ",
        ),
        ({f"{EMBEDDERS}.3.params.n_cond_frames": 2}, "in_channels: expected 12 .*, got 8: "),
        ({"network_config.params.out_channels": 8}, r"out_channels: expected 4 \(4 of latents\)"),
        ({EMBEDDERS: []}, r"adm_in_channels: expected None \(nothing enters\), got 48: "),
    ],
)
def test_widths_that_do_not_fit_are_refused_when_the_model_is_built(changes, message):
    """Caught: torch's "mat1 and mat2 shapes cannot be multiplied", with the first step of a run."""
    with pytest.raises(ValueError, match=f"^network_config.params.{message}"):
        build(**changes)


class Zeros(nn.Module):
    """An embedder of another's making, which does not tell its width."""

    def forward(self, x):
        return torch.zeros(len(x), 16)


def test_an_embedder_that_does_not_tell_its_width_is_let_pass():
    """Caught: a model refused that works, for its embedder is none of ours."""
    embedder = {"input_key": "cond_aug", "target": f"{__name__}.Zeros"}
    assert "cond_aug" in build(**{f"{EMBEDDERS}.4": embedder}).conditioner.input_keys


def test_embedders_of_one_entry_add_up():
    """Catches: the last of two embedders of the same number taken for both."""
    config = tiny_config()
    models = config.model.params.conditioner_config.params.emb_models
    models.append(models[1].copy())
    config.model.params.network_config.params.adm_in_channels += models[1].params.outdim
    DiffusionEngine.without_weights(config.model)


def test_a_first_stage_that_does_not_tell_its_width_is_let_pass():
    engine = build()
    check_widths(engine.model.diffusion_model, engine.conditioner, nn.Identity())
