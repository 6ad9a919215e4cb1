"""Preconditioning: recorded outputs, variances by hand, precision and quantization."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sgm.modules.diffusionmodules import denoiser_scaling
from sgm.modules.diffusionmodules.denoiser import Denoiser, DiscreteDenoiser

RECORDED = load_file(Path(__file__).parents[1] / "data" / "parity" / "denoiser.safetensors")
D = "sgm.modules.diffusionmodules"
SIGMAS = torch.tensor([0.002, 0.5, 12.0, 700.0])


def scaling(name, **params):
    return {"target": f"{D}.denoiser_scaling.{name}", "params": params}


def sine(x, c_noise, cond):
    return torch.sin(x) + c_noise.reshape(-1, 1, 1, 1) * cond["k"]


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("v_edm", "VScalingWithEDMcNoise"),
        ("EDMScaling", "EDMScaling"),
        ("EpsScaling", "EpsScaling"),
        ("VScaling", "VScaling"),
    ],
)
def test_recorded_outputs(key, name):
    # catches: c_out of the wrong sign, c_noise without the factor 1/4, c_in applied twice
    out = Denoiser(scaling(name))(sine, RECORDED["in.x"], SIGMAS, {"k": 0.3})
    torch.testing.assert_close(out, RECORDED[f"out.{key}"], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("scale", "sigma_data"),
    [
        (denoiser_scaling.EDMScaling(0.5), 0.5),
        (denoiser_scaling.EDMScaling(1.3), 1.3),
        (denoiser_scaling.VScaling(), 1.0),
        (denoiser_scaling.VScalingWithEDMcNoise(), 1.0),
    ],
)
def test_network_sees_and_predicts_unit_variance(scale, sigma_data):
    """The two conditions that EDM derives its coefficients from (appendix B.6).

    Catches: sigma_data not squared, c_skip and c_out of different families.
    """
    sigma = torch.logspace(-2, 2.5, 9, dtype=torch.float64)
    c_skip, c_out, c_in, _ = scale(sigma)
    variance_in = c_in**2 * (sigma_data**2 + sigma**2)
    variance_target = ((1 - c_skip) ** 2 * sigma_data**2 + c_skip**2 * sigma**2) / c_out**2
    torch.testing.assert_close(variance_in, torch.ones_like(sigma))
    torch.testing.assert_close(variance_target, torch.ones_like(sigma))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_loses_no_more_than_rounding(dtype):
    # catches: coefficients in half precision (c_skip at sigma 700 is 2e-6, a subnormal float16)
    x = (RECORDED["in.x"] * 30).to(dtype)
    answer = RECORDED["in.x"].flip(0).to(dtype)
    seen = []

    def network(x, c_noise, cond):
        seen.append((x.dtype, c_noise.dtype))
        return answer

    out = Denoiser(scaling("VScalingWithEDMcNoise"))(network, x, SIGMAS.to(dtype), {})
    s = SIGMAS.to(dtype).double().reshape(-1, 1, 1, 1)
    expected = x.double() / (s**2 + 1) - s / (s**2 + 1).sqrt() * answer.double()
    assert out.dtype == dtype
    assert seen == [(dtype, torch.float32)]
    # one rounding at the end, plus float32 cancellation
    torch.testing.assert_close(
        out.double(), expected, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-5
    )


def test_further_inputs_reach_the_network():
    def network(x, c_noise, cond, *, num_video_frames):
        return x * num_video_frames

    x = RECORDED["in.x"]
    out = Denoiser(scaling("EpsScaling"))(network, x, SIGMAS, {}, num_video_frames=0)
    assert torch.equal(out, x)


def discrete(**kw):
    ddpm = {"target": f"{D}.discretizer.LegacyDDPMDiscretization"}
    return DiscreteDenoiser(scaling("EpsScaling"), 1000, ddpm, **kw)


def test_discrete_denoiser_uses_the_nearest_level_and_its_index():
    # catches: levels in falling order, the index of the unquantized level, a float index
    denoiser = discrete()
    levels = denoiser.sigmas
    assert list(denoiser.state_dict()) == ["sigmas"]
    asked = torch.stack([levels[0] * 0.5, levels[7] * 1.0001, levels[999] * 2])
    seen = {}

    def network(x, c_noise, cond):
        seen["index"] = c_noise
        return torch.ones_like(x)

    out = denoiser(network, torch.zeros(3, 1), asked, {})
    assert torch.equal(seen["index"], torch.tensor([0, 7, 999]))
    assert torch.equal(out, -levels[[0, 7, 999], None])


def test_discrete_denoiser_can_keep_the_level_as_noise_input():
    seen = []

    def network(x, c_noise, cond):
        seen.append(c_noise)
        return x

    denoiser = discrete(quantize_c_noise=False, flip=False, do_append_zero=True)
    assert denoiser.sigmas[-1] == 0
    denoiser(network, torch.zeros(1, 1), denoiser.sigmas[3:4], {})
    assert torch.equal(seen[0], denoiser.sigmas[3:4])
