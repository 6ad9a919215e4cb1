"""Noise schedules, distributions of noise levels and loss weights against their formulas."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sgm.modules.diffusionmodules import discretizer, loss_weighting, sigma_sampling

RECORDED = load_file(Path(__file__).parents[1] / "data" / "parity" / "schedules.safetensors")
DDPM = {"target": "sgm.modules.diffusionmodules.discretizer.LegacyDDPMDiscretization"}

# float32 rounding of the last operations: half a unit in the last place is 6e-8
ROUNDING = {"rtol": 1e-6, "atol": 0}


@pytest.mark.parametrize("n", [1, 2, 10, 25, 30])
def test_edm_matches_recorded_levels(n):
    # catches: sigma_min and sigma_max swapped, i / n instead of i / (n - 1), a missing zero
    sigmas = discretizer.EDMDiscretization(sigma_max=700.0)(n)
    torch.testing.assert_close(sigmas, RECORDED[f"out.edm700_{n}"], **ROUNDING)


def test_other_recorded_levels():
    # catches: another default of sigma_max or of the betas, steps rounded up instead of down
    edm = discretizer.EDMDiscretization()(18)
    torch.testing.assert_close(edm, RECORDED["out.edm_default_18"], **ROUNDING)
    ddpm = discretizer.LegacyDDPMDiscretization()(50)
    torch.testing.assert_close(ddpm, RECORDED["out.ddpm_50"], **ROUNDING)


@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
def test_edm_follows_the_formula(rho):
    # catches: rho used as its inverse, a ramp in the wrong direction
    sigmas = discretizer.EDMDiscretization(0.01, 50.0, rho)(9, do_append_zero=False)
    expected = [
        (50.0 ** (1 / rho) + i / 8 * (0.01 ** (1 / rho) - 50.0 ** (1 / rho))) ** rho
        for i in range(9)
    ]
    # the power of rho multiplies float32 rounding by rho, and the difference of roots cancels
    assert sigmas.tolist() == pytest.approx(expected, rel=1e-5 if rho > 1 else 2e-4)


@pytest.mark.parametrize("n", [1, 7, 999, 1000])
def test_ddpm_follows_the_formula(n):
    # catches: betas even in themselves instead of in their root, the noisiest level left out
    product, levels = 1.0, []
    for i in range(1000):
        root = math.sqrt(0.00085) + i / 999 * (math.sqrt(0.012) - math.sqrt(0.00085))
        product *= 1 - root**2
        levels.append(math.sqrt((1 - product) / product))
    steps = range(1000) if n == 1000 else [math.floor(999 * k / n) for k in range(1, n + 1)]
    sigmas = discretizer.LegacyDDPMDiscretization()(n, do_append_zero=False, flip=True)
    assert sigmas.tolist() == pytest.approx([levels[i] for i in steps], rel=1e-6)


@pytest.mark.parametrize(
    "schedule", [discretizer.EDMDiscretization(), discretizer.LegacyDDPMDiscretization()]
)
def test_levels_fall_to_zero_and_flip(schedule):
    # catches: flip before the zero is appended, float64 results
    sigmas = schedule(12)
    assert sigmas.dtype == torch.float32
    assert (sigmas.diff() < 0).all()
    assert sigmas[-1] == 0
    assert torch.equal(schedule(12, flip=True), sigmas.flip(0))
    assert torch.equal(schedule(12, do_append_zero=False), sigmas[:-1])


def test_levels_are_real_while_a_model_is_built_on_the_meta_device():
    # catches: tensors made on the default device
    with torch.device("meta"):
        for name in ("EDMDiscretization", "LegacyDDPMDiscretization"):
            assert getattr(discretizer, name)()(3).device.type == "cpu"


def test_impossible_schedules_are_refused():
    with pytest.raises(ValueError, match="at least 1 sampling step, got 0"):
        discretizer.EDMDiscretization()(0)
    with pytest.raises(ValueError, match=r"at most 1000 steps.*got 1001"):
        discretizer.LegacyDDPMDiscretization()(1001)
    with pytest.raises(ValueError, match="got sigma_min=3"):
        discretizer.EDMDiscretization(sigma_min=3.0, sigma_max=2.0)


def test_edm_sampling_matches_recorded_draws():
    # catches: p_std squared, the exponential left out
    draws = sigma_sampling.EDMSampling(1.0, 1.6)(64, rand=RECORDED["in.rand"])
    torch.testing.assert_close(draws, RECORDED["out.edm_sampling"], **ROUNDING)


def test_edm_sampling_is_log_normal_and_repeatable():
    # catches: the generator ignored. Standard error of the mean: 1.6 / sqrt(20000) = 0.011
    sampler = sigma_sampling.EDMSampling(p_mean=0.7, p_std=1.6)
    logs = sampler(20000, generator=torch.Generator().manual_seed(1)).log()
    assert logs.mean().item() == pytest.approx(0.7, abs=0.05)
    assert logs.std().item() == pytest.approx(1.6, abs=0.05)
    assert torch.equal(sampler(20000, generator=torch.Generator().manual_seed(1)).log(), logs)


def test_discrete_sampling_draws_the_levels_of_the_schedule():
    # catches: an end index that is included, levels in falling order
    levels = discretizer.LegacyDDPMDiscretization()(1000, do_append_zero=False, flip=True)
    sampler = sigma_sampling.DiscreteSampling(DDPM, 1000, idx_range=(10, 13))
    draws = sampler(200, generator=torch.Generator().manual_seed(0))
    assert set(draws.tolist()) == set(levels[10:13].tolist())
    everywhere = sigma_sampling.DiscreteSampling(DDPM, 1000)
    assert torch.equal(everywhere(2, rand=torch.tensor([0, 999])), levels[[0, 999]])


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("UnitWeighting", lambda s: s**0),
        ("EDMWeighting", lambda s: (s * s + 0.25) / (0.5 * s) ** 2),
        ("VWeighting", lambda s: (1 + s * s) / (s * s)),
        ("EpsWeighting", lambda s: 1 / (s * s)),
    ],
)
def test_weightings(name, formula):
    # catches: sigma_data 0.5 where 1 is meant, a weight not squared
    sigmas = torch.logspace(-2.5, 2.8, 32)
    weights = getattr(loss_weighting, name)()(sigmas)
    torch.testing.assert_close(weights, RECORDED[f"out.{name}"], **ROUNDING)
    assert weights.tolist() == pytest.approx([formula(s) for s in sigmas.tolist()], rel=1e-6)
