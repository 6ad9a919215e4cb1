"""Guidance: recorded outputs and scales written out by hand."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sgm.modules.diffusionmodules import guiders

RECORDED = load_file(Path(__file__).parents[1] / "data" / "parity" / "guiders.safetensors")


def scales(guider, rows, num_frames=None):
    """The scale applied to each row: the guided estimate of 0 (unconditional) and 1."""
    x = torch.cat([torch.zeros(rows, 2, 1), torch.ones(rows, 2, 1)])
    out = guider(x, torch.ones(rows), num_frames)
    assert out.shape == (rows, 2, 1)
    assert torch.equal(out[:, 0], out[:, 1])
    return out[:, 0, 0].tolist()


@pytest.mark.parametrize(
    ("key", "guider"),
    [
        ("vanilla", guiders.VanillaCFG(scale=2.5)),
        ("linear", guiders.LinearPredictionGuider(max_scale=3.0, min_scale=1.5, num_frames=8)),
        ("triangle", guiders.TrianglePredictionGuider(max_scale=2.5, num_frames=8)),
        (
            "triangle2",
            guiders.TrianglePredictionGuider(
                max_scale=2.5, num_frames=8, period=[1.0, 2.0], period_fusing="mean"
            ),
        ),
    ],
)
def test_recorded_outputs(key, guider):
    # catches: halves swapped, scales in reverse order of the frames
    out = guider(RECORDED["in.x"], torch.full((8,), 3.0))
    torch.testing.assert_close(out, RECORDED[f"out.{key}"], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("guider", "expected"),
    [
        (guiders.VanillaCFG(2.5), [2.5] * 5),
        (guiders.LinearPredictionGuider(3.0, 5), [1.0, 1.5, 2.0, 2.5, 3.0]),
        (guiders.LinearPredictionGuider(3.0, 1), [1.0]),
        (guiders.LinearPredictionGuider(1.0, 3, min_scale=2.0), [2.0, 1.5, 1.0]),
        (guiders.TrianglePredictionGuider(3.0, 5), [1.0, 2.0, 3.0, 2.0, 1.0]),
        (guiders.TrianglePredictionGuider(3.0, 5, period=0.5), [1.0, 3.0, 1.0, 3.0, 1.0]),
        # waves 0 .5 1 .5 0 and 0 .25 .5 .75 1
        (
            guiders.TrianglePredictionGuider(5.0, 5, period=[1, 2], period_fusing="max"),
            [1.0, 3.0, 5.0, 4.0, 5.0],
        ),
        (
            guiders.TrianglePredictionGuider(5.0, 5, period=[1, 2], period_fusing="multiply"),
            [1.0, 1.5, 3.0, 2.5, 1.0],
        ),
        (
            guiders.TrapezoidPredictionGuider(3.0, 10, edge_perc=0.3),
            [1.0, 2.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 2.0, 1.0],
        ),
        (guiders.TrapezoidPredictionGuider(3.0, 4), [3.0] * 4),
        (guiders.PerFrameGuider([1.0, 4.0, 0.5]), [1.0, 4.0, 0.5]),
    ],
)
def test_scales_written_by_hand(guider, expected):
    # catches: a plateau of 1 instead of max_scale, min_scale ignored, waves fused another way;
    # for two clips, scales repeated frame by frame instead of clip by clip
    assert scales(guider, len(expected)) == pytest.approx(expected)
    assert scales(guider, 2 * len(expected), len(expected)) == pytest.approx(expected * 2)


def test_number_of_frames_may_come_late():
    # catches: the constructor's number winning over the call's, a cache blind to it
    guider = guiders.LinearPredictionGuider(max_scale=2.0)
    assert scales(guider, 3) == [1.0, 1.5, 2.0]
    assert scales(guider, 6, 3) == [1.0, 1.5, 2.0] * 2
    assert scales(guider, 6, 2) == [1.0, 2.0] * 3
    assert scales(guiders.LinearPredictionGuider(2.0, num_frames=6), 6, 3) == [1.0, 1.5, 2.0] * 2


def test_frames_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="whole clips of 4 frames, got 6"):
        scales(guiders.LinearPredictionGuider(2.0, num_frames=4), 6)
    with pytest.raises(ValueError, match="each of 4 frames, got 3"):
        scales(guiders.PerFrameGuider([1.0, 2.0, 3.0]), 4, 4)
    with pytest.raises(ValueError, match=r"period_fusing.*'sum'"):
        guiders.TrianglePredictionGuider(2.0, period_fusing="sum")
    with pytest.raises(ValueError, match="edge_perc"):
        guiders.TrapezoidPredictionGuider(2.0, edge_perc=0.6)


def test_scale_one_is_exactly_the_conditional_estimate():
    # catches: rounding by x_u + (x_c - x_u), which a model distilled to scale 1 would show
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)) * 1e4
    assert torch.equal(guiders.VanillaCFG(1.0)(x, torch.ones(4)), x[4:])


def test_scales_take_the_type_of_the_input():
    x = torch.ones(4, 3, dtype=torch.bfloat16)
    assert guiders.VanillaCFG(1.5)(x, torch.ones(2)).dtype == torch.bfloat16


def test_scales_made_in_inference_mode_serve_training():
    # catches: an inference tensor kept by the guider, which autograd refuses
    guider = guiders.VanillaCFG(2.0)
    with torch.inference_mode():
        guider(torch.ones(2, 1), torch.ones(1))
    x = torch.ones(2, 1, requires_grad=True)
    guider(x, torch.ones(1)).sum().backward()
    assert x.grad.flatten().tolist() == [-1.0, 2.0]


def test_unconditional_rows_come_first():
    x, s = torch.arange(2.0), torch.tensor([3.0, 4.0])
    c = {"crossattn": torch.ones(2, 1), "num_video_frames": 2}
    uc = {"crossattn": torch.zeros(2, 1), "num_video_frames": 2}
    rows, levels, cond = guiders.VanillaCFG(2.0).prepare_inputs(x, s, c, uc)
    assert rows.tolist() == [0.0, 1.0, 0.0, 1.0]
    assert levels.tolist() == [3.0, 4.0, 3.0, 4.0]
    assert cond["crossattn"].flatten().tolist() == [0.0, 0.0, 1.0, 1.0]
    assert cond["num_video_frames"] == 2


def test_identity_passes_everything_through():
    x, s, c = torch.arange(2.0), torch.ones(2), {"vector": torch.ones(2)}
    guider = guiders.IdentityGuider()
    rows, levels, cond = guider.prepare_inputs(x, s, c, None)
    assert torch.equal(rows, x)
    assert torch.equal(levels, s)
    assert cond == c
    assert guider(x, s) is x


def test_conditioning_that_does_not_fit_is_refused():
    guider = guiders.LinearPredictionGuider(2.0, additional_cond_keys="camera")
    c, uc = {"camera": torch.ones(1)}, {"camera": torch.zeros(1)}
    assert guider.prepare_cond(c, uc)["camera"].tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match=r"LinearPredictionGuider needs.*`uc`"):
        guider.prepare_cond(c, None)
    with pytest.raises(ValueError, match="same keys"):
        guider.prepare_cond(c, {})
    with pytest.raises(ValueError, match="'mask' differs"):
        guider.prepare_cond({"mask": torch.ones(1)}, {"mask": torch.zeros(1)})
