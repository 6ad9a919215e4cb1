"""Samplers: recorded outputs, and the closed-form solution for Gaussian data."""

import logging
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sgm.modules.diffusionmodules import sampling

RECORDED = load_file(Path(__file__).parents[1] / "data" / "parity" / "samplers.safetensors")
D = "sgm.modules.diffusionmodules"
STD = 0.7  # of the Gaussian data
NAMES = [
    "EulerEDMSampler",
    "HeunEDMSampler",
    "EulerAncestralSampler",
    "DPMPP2SAncestralSampler",
    "DPMPP2MSampler",
    "LinearMultistepSampler",
]
ALL = [*NAMES, "LCMSampler"]


def build(name, num_steps=None, guider=None, sigma_min=0.002, sigma_max=700.0, **params):
    edm = {"sigma_min": sigma_min, "sigma_max": sigma_max}
    schedule = {"target": f"{D}.discretizer.EDMDiscretization", "params": edm}
    return getattr(sampling, name)(
        discretization_config=schedule, num_steps=num_steps, guider_config=guider, **params
    )


def gaussian(x, sigma, cond):
    """The exact denoised estimate of data from N(0, STD^2)."""
    variance = sigma.reshape(-1, *[1] * (x.ndim - 1)) ** 2
    return x * STD**2 / (STD**2 + variance)


@pytest.mark.parametrize("steps", [1, 4, 11])
@pytest.mark.parametrize(
    ("key", "params"),
    [
        *[(name, {}) for name in NAMES],
        ("EulerEDMSampler/churn", {"s_churn": 4.0}),
        ("EulerAncestralSampler/eta", {"eta": 0.5}),
    ],
)
def test_recorded_outputs(key, params, steps):
    # catches: noise added before instead of after the step, churn per N + 1 steps, the wrong order
    # of a multistep history, the start not scaled by sqrt(1 + sigma_0^2)
    target = RECORDED["in.target"]

    def denoiser(x, sigma, cond):
        s = sigma.reshape(-1, 1, 1, 1)
        return (x + s**2 * target * cond["k"]) / (1 + s**2) + 0.1 * torch.tanh(x / (1 + s))

    torch.manual_seed(0)
    out = build(key.split("/")[0], steps, **params)(denoiser, RECORDED["in.x"], cond={"k": 0.7})
    recorded = RECORDED[f"out.{key}_{steps}"]
    # float32 round-off in another order of operations; the largest is 1.2e-5, of DPM-Solver++(2S),
    # whose middle level amplifies the rounding of the level that it aims at
    assert (out - recorded).norm() / recorded.norm() < 2e-5


@pytest.mark.parametrize(
    ("name", "params", "order"),
    [
        ("EulerEDMSampler", {}, 1),
        ("HeunEDMSampler", {}, 2),
        ("EulerAncestralSampler", {"eta": 0.0}, 1),
        ("DPMPP2SAncestralSampler", {"eta": 0.0}, 2),
        ("DPMPP2MSampler", {}, 2),
        ("LinearMultistepSampler", {"order": 1}, 1),
        ("LinearMultistepSampler", {"order": 2}, 2),
        ("LinearMultistepSampler", {"order": 3}, 3),
    ],
)
def test_order_of_convergence(name, params, order):
    """Halving the steps divides the error by 2^order, against ``x STD / sqrt(STD^2 + sigma^2)``.

    Catches: Heun without its correction, an extrapolation of the wrong weight (first order then).
    """
    x = torch.tensor([[1.0], [-0.5]], dtype=torch.float64)
    errors = []
    for steps in (80, 160):
        sampler = build(name, steps, sigma_min=1e-4, sigma_max=80.0, **params)
        start = float(sampler.discretization(steps)[0])
        exact = x * math.sqrt(1 + start**2) * STD / math.sqrt(STD**2 + start**2)
        errors.append((sampler(gaussian, x, {}) - exact).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)
    assert errors[1] < 0.02


def test_ancestral_without_noise_is_euler():
    x = RECORDED["in.x"]
    euler = build("EulerEDMSampler", 7)(gaussian, x, {})
    assert torch.equal(build("EulerAncestralSampler", 7, eta=0.0)(gaussian, x, {}), euler)
    assert torch.equal(
        build("LinearMultistepSampler", 1)(gaussian, x, {}),
        build("EulerEDMSampler", 1)(gaussian, x, {}),
    )


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("EulerAncestralSampler", {}),
        ("EulerAncestralSampler", {"eta": 0.5}),
        ("DPMPP2SAncestralSampler", {}),
        ("EulerEDMSampler", {"s_churn": 40.0}),
        ("HeunEDMSampler", {"s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 50.0}),
    ],
)
def test_random_samplers_keep_the_distribution(name, params):
    """Samples have the variance of the data.

    Catches: noise of variance ``up`` instead of ``up^2``, churn without raising the level.
    Standard error of the deviation with 20000 samples: 0.5 %; the rest is the step size.
    """
    generator = torch.Generator().manual_seed(0)

    def noise_fn(x):
        return torch.randn(x.shape, generator=generator)

    x = noise_fn(torch.empty(20000, 1))
    sampler = build(name, 600, sigma_max=80.0, **params)
    out = sampler(gaussian, x, {}, noise_fn=noise_fn)
    assert out.std().item() == pytest.approx(STD, rel=0.03)
    assert abs(out.mean().item()) < 0.02


def test_churn_keeps_to_its_range():
    # catches: s_tmin and s_tmax ignored or swapped
    seen = []

    def denoiser(x, sigma, cond):
        seen.append(sigma[0].item())
        return gaussian(x, sigma, cond)

    sampler = build("EulerEDMSampler", 6, s_churn=1.0, s_tmin=1.0, s_tmax=100.0)
    sampler(denoiser, RECORDED["in.x"], {})
    levels = sampler.discretization(6).tolist()[:-1]
    raised = [level * (7 / 6 if 1 <= level <= 100 else 1) for level in levels]
    assert seen == pytest.approx(raised, rel=1e-6)


def test_ancestral_levels():
    # catches: a split whose variances do not add up; eta = 1 is DDPM's posterior, by hand
    down, up = sampling.ancestral_levels(10.0, 4.0, 1.0)
    assert (down, up) == pytest.approx((1.6, math.sqrt(16 - 1.6**2)))
    assert sampling.ancestral_levels(10.0, 4.0, 0.0) == (4.0, 0.0)
    assert sampling.ancestral_levels(10.0, 4.0, 9.0) == (0.0, 4.0)
    assert sampling.ancestral_levels(10.0, 0.0, 1.0) == (0.0, 0.0)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_multistep_weights_integrate_polynomials(order):
    # catches: any wrong Lagrange coefficient: the rule is exact up to degree order - 1
    levels, after = [9.0, 5.5, 4.0, 1.5][-order:], 0.2
    weights = sampling.multistep_weights(levels, after)
    for k in range(order):
        integral = (after ** (k + 1) - levels[-1] ** (k + 1)) / (k + 1)
        assert sum(w * s**k for w, s in zip(weights, levels, strict=True)) == pytest.approx(
            integral
        )


@pytest.mark.parametrize("name", ALL)
def test_runs_where_its_input_is_without_reading_values(name):
    """Tensors of the meta device have no values: a host read or a fixed device raises.

    Catches: ``.item()`` or a comparison of tensors in the loop, noise levels left on the CPU.
    """
    guider = {
        "target": f"{D}.guiders.LinearPredictionGuider",
        "params": {"max_scale": 2.0, "num_frames": 3},
    }
    params = {"s_churn": 1.0} if "EDM" in name else {}
    cond = {"vector": torch.empty(6, 2, device="meta")}
    seen = set()

    def denoiser(x, sigma, cond):
        seen.add((x.shape, sigma.shape, sigma.dtype, sigma.device.type))
        return x * sigma[:, None].to(x.dtype)

    x = torch.empty(6, 5, device="meta", dtype=torch.float16)
    out = build(name, 4, guider, device="cuda", **params)(denoiser, x, cond, cond)
    assert (out.shape, out.dtype, out.device.type) == (x.shape, x.dtype, "meta")
    assert seen == {((12, 5), (12,), torch.float32, "meta")}


@pytest.mark.parametrize("name", ALL)
def test_a_video_is_the_same_alone_and_in_a_batch(name):
    """With noise drawn per video, bit for bit. Catches: noise drawn over the whole batch."""
    frames = 2
    params = {"s_churn": 4.0} if "EDM" in name else {}
    guider = {"target": f"{D}.guiders.LinearPredictionGuider", "params": {"max_scale": 3.0}}

    def sample(seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def noise_fn(x):
            drawn = [torch.randn(frames, *x.shape[1:], generator=g) for g in generators]
            return torch.cat(drawn).to(x)

        x = noise_fn(torch.empty(0, 4, 6))
        cond = {"vector": torch.ones(len(x), 1)}
        uc = {"vector": torch.zeros(len(x), 1)}

        def denoiser(x, sigma, cond):
            return gaussian(x, sigma, cond) + 0.1 * cond["vector"][..., None]

        return build(name, 5, guider, **params)(
            denoiser, x, cond, uc, num_frames=frames, noise_fn=noise_fn
        )

    assert torch.equal(sample([3, 8])[frames:], sample([8]))


def consistent(x, sigma, cond):
    """The exact consistency function of data from N(0, STD^2): the end of the path through x."""
    variance = sigma.reshape(-1, *[1] * (x.ndim - 1)) ** 2
    return x * STD / (STD**2 + variance).sqrt()


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_lcm_walks_as_the_consistency_scheduler_of_diffusers(steps):
    """Levels and steps of ``CMStochasticIterativeScheduler``, given the same estimates and noise.

    It has its own boundary scalings, which are taken back here, and adds
    ``sqrt(tau^2 - sigma_min^2)`` of noise where AnimateLCM-SVD's own scheduler adds ``tau``: a
    difference of 5e-5 at the lowest level of 8 steps.

    Catches: levels spread over the whole schedule (the last one 0.002), noise of the level that a
    step came from, an Euler step in place of the full one.
    """
    from diffusers.schedulers import CMStochasticIterativeScheduler

    theirs = CMStochasticIterativeScheduler(
        num_train_timesteps=40,
        sigma_min=0.002,
        sigma_max=700.0,
        sigma_data=1.0,
        clip_denoised=False,
    )
    theirs.set_timesteps(steps)
    sampler = build("LCMSampler", steps)
    levels = torch.tensor(sampler.noise_levels(steps))
    torch.testing.assert_close(levels[:-1], theirs.sigmas[:-1], rtol=1e-5, atol=0)

    def estimate(x, sigma, cond):
        return 0.3 * torch.sin(x) + consistent(x, sigma, cond)

    noise = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(1))
    x = noise * math.sqrt(1 + 700.0**2)
    for t, sigma in zip(theirs.timesteps, theirs.sigmas[:-1], strict=True):
        theirs.scale_model_input(x, t)
        c_skip, c_out = theirs.get_scalings_for_boundary_condition(sigma)
        output = (estimate(x, sigma.repeat(4), {}) - c_skip * x) / c_out
        x = theirs.step(output, t, x, torch.Generator().manual_seed(7)).prev_sample
    drawn = torch.randn(noise.shape, generator=torch.Generator().manual_seed(7))
    ours = sampler(estimate, noise, {}, noise_fn=lambda _: drawn)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 8, 40])
def test_lcm_keeps_the_distribution_in_any_number_of_steps(steps):
    """With an exact consistency function there is no step error (Song et al. 2023, section 4).

    Catches: noise of the variance tau, noise left on the result, a step that keeps some of ``x``.
    Standard error of the deviation with 20000 samples: 0.5 %.
    """
    generator = torch.Generator().manual_seed(0)

    def noise_fn(x):
        return torch.randn(x.shape, generator=generator)

    x = noise_fn(torch.empty(20000, 1))
    out = build("LCMSampler", steps)(consistent, x, {}, noise_fn=noise_fn)
    assert out.std().item() == pytest.approx(STD, rel=0.02)
    if steps == 1:
        torch.testing.assert_close(out, x * STD, rtol=1e-5, atol=1e-5)


def test_guidance_is_applied_with_the_conditioning_merged_once():
    # catches: conditioning concatenated anew for every step (a cache by identity would miss)
    guider = {"target": f"{D}.guiders.VanillaCFG", "params": {"scale": 3.0}}
    c, uc = {"vector": torch.full((2, 1), 1.0)}, {"vector": torch.full((2, 1), 0.5)}
    merged = []

    def denoiser(x, sigma, cond):
        merged.append(cond["vector"])
        return cond["vector"].expand_as(x)

    out = build("EulerEDMSampler", 3, guider)(denoiser, torch.ones(2, 4), c, uc)
    # the estimate is constant: 0.5 + 3 (1 - 0.5); float32 cancellation from sigma 700
    torch.testing.assert_close(out, torch.full((2, 4), 2.0), rtol=0, atol=1e-3)
    assert all(cond is merged[0] for cond in merged)


def test_callback_sees_every_step_and_can_stop():
    # catches: None taken for False, the noise level after the step instead of before it
    x, seen, estimates = RECORDED["in.x"], [], []
    sampler = build("EulerEDMSampler", 5)
    levels = sampler.discretization(5)

    def watch(step, num_steps, sigma, denoised):
        seen.append((step, num_steps, sigma))
        estimates.append(denoised)

    def stop(step, num_steps, sigma, denoised):
        return step < 3

    full = sampler(gaussian, x, {}, callback=watch)
    assert seen == [(i + 1, 5, levels[i].item()) for i in range(5)]
    assert torch.equal(full, sampler(gaussian, x, {}))
    stopped = sampler(gaussian, x, {}, callback=stop)  # the fourth step would begin here
    assert torch.equal(estimates[3], gaussian(stopped, levels[3], {}))


def test_input_is_left_as_it_is_and_steps_can_be_overridden(caplog):
    x = RECORDED["in.x"].clone()
    sampler = build("EulerEDMSampler", 5, verbose=True)
    with caplog.at_level(logging.INFO, logger=sampling.__name__):
        sampler(gaussian, x, {}, num_steps=2)
    assert torch.equal(x, RECORDED["in.x"])
    assert [record.message for record in caplog.records] == [
        "EulerEDMSampler: step 1/2, sigma 700",
        "EulerEDMSampler: step 2/2, sigma 0.002",
    ]


def test_impossible_runs_are_refused():
    x = RECORDED["in.x"]
    with pytest.raises(ValueError, match="expected num_steps"):
        build("EulerEDMSampler")(gaussian, x, {})
    with pytest.raises(ValueError, match="at least 1 sampling step, got 0"):
        build("EulerEDMSampler", 5)(gaussian, x, {}, num_steps=0)
    with pytest.raises(ValueError, match="expected 1 to 40 sampling steps, got 41"):
        build("LCMSampler", 41)(gaussian, x, {})
    with pytest.raises(ValueError, match="order of at least 1"):
        build("LinearMultistepSampler", 5, order=0)
