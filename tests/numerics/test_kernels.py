"""``sgm.kernels`` against formulas written out in float64, in both forms.

The Triton form runs for real on a CUDA device (``pytest -m gpu``). Without one, the same tests run
in Triton's interpreter, in a process of their own: Triton looks for TRITON_INTERPRET when it is
first imported. Mistakes that were made on purpose and seen: statistics of a row where those of a
clip are due; a row's shift taken in blocks, not in turn; E[x^2] - E[x]^2; the last, shorter stretch
of positions counted as a whole one; a mask left out; a channel's group counted in padded widths;
value and gate exchanged; the tanh form of GELU; x and y exchanged; image rows blended; heads as
"(d heads)"; keys beyond the last frame; no scale; frames of two clips mixed.
"""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from sgm import kernels
from tests.recorded import noise, relative_error

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available()

ON_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]
REFERENCE = pytest.param(("reference", "cpu"), id="cpu")
REAL = pytest.param(("triton", "cuda"), id="cuda", marks=ON_CUDA)
SIMULATED = pytest.param(("triton", "cpu"), id="interpreter")

both_forms = pytest.mark.parametrize("form", [SIMULATED] if INTERPRETED else [REFERENCE, REAL])
triton_form = pytest.mark.parametrize("form", [SIMULATED] if INTERPRETED else [REAL])
real_form = pytest.mark.parametrize("form", [REAL])
all_dtypes = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)


def check(form, function, oracle, dtype, *inputs, lost=1, **named):
    """Compare a function with its formula, which sees the same inputs, rounded to ``dtype``.

    Of 16-bit results, Triton rounds each once, by half a unit at most, and the attention weights;
    PyTorch rounds sums on the way too. Sums in float32 and float64 lose a digit. One wrong
    value among the 10,000 here is a relative error of 0.01. ``lost`` is how much larger a mean is
    than what remains of the inputs without it: as many times less of float32 is left.
    """
    form, device = form

    def prepared(to):
        return [
            [x.to(dtype).to(device, to) if isinstance(x, Tensor) else x for x in values]
            for values in (inputs, named.values())
        ]

    positional, by_name = prepared(dtype)
    with kernels.use(form):
        out = function(*positional, **dict(zip(named, by_name, strict=True)))
    positional, by_name = prepared(torch.float64)
    expected = oracle(*positional, **dict(zip(named, by_name, strict=True)))
    half = dtype in (torch.float16, torch.bfloat16)
    roundings = 20 if not half else 1.5 if form == "reference" else 0.5
    limit = roundings * lost * torch.finfo(dtype).eps
    outs, expected = ((x,) if isinstance(x, Tensor) else x for x in (out, expected))
    for out, value in zip(outs, expected, strict=True):
        assert (out.dtype, out.shape) == (dtype, value.shape)
        assert out.is_contiguous()
        assert relative_error(out.double(), value) < limit


def shifted(x, shift):
    """Row by row, as the contract is worded."""
    if shift is None:
        return x
    return torch.stack([row + shift[i % len(shift)] for i, row in enumerate(x)])


def optional(case, *shape):
    return noise(case, *shape) if shape[0] else None


# --- GroupNorm -----------------------------------------------------------------------------------


def group_norm_formula(x, weight, bias, groups, eps, *, shift=None, frames=1, silu=False):
    n, _, c = x.shape
    out = shifted(x, shift).clone()
    for first in range(0, n, frames):
        for group in range(groups):
            channels = slice(group * c // groups, (group + 1) * c // groups)
            part = out[first : first + frames, :, channels]
            mean = part.sum() / part.numel()
            variance = ((part - mean) ** 2).sum() / part.numel()
            out[first : first + frames, :, channels] = (part - mean) / (variance + eps) ** 0.5
    out = out * weight + bias
    return out / (1 + torch.exp(-out)) if silu else out


@both_forms
@pytest.mark.parametrize(
    ("n", "s", "c", "groups", "frames", "shifts", "silu"),
    [
        (2, 70, 96, 32, 1, 0, False),
        (4, 70, 96, 32, 2, 4, True),
        (6, 1, 64, 8, 3, 1, True),
        (25, 7, 96, 32, 25, 5, False),
        (2, 300, 32, 32, 1, 2, True),
        (3, 33, 130, 2, 3, 3, False),
    ],
)
def test_group_norm(form, n, s, c, groups, frames, shifts, silu):
    inputs = noise("x", n, s, c), noise("weight", c), noise("bias", c), groups, 1e-5
    named = {"shift": optional("shift", shifts, c), "frames": frames, "silu": silu}
    check(form, kernels.group_norm, group_norm_formula, torch.float32, *inputs, **named)


@both_forms
@all_dtypes
def test_group_norm_in_all_types(form, dtype):
    c = 96
    inputs = noise("x", 4, 50, c), noise("weight", c), noise("bias", c), 8, 1e-5
    shift = noise("shift", 2, c)
    for named in ({}, {"shift": shift, "frames": 2}):
        check(form, kernels.group_norm, group_norm_formula, dtype, *inputs, **named)


@both_forms
@pytest.mark.parametrize("shifts", [0, 4])
def test_group_norm_of_a_large_mean(form, shifts):
    """Groups a thousand deviations from zero, where float32 squares have no digits left for one."""
    x = noise("x", 4, 300, 64)
    x[1:, :, 40:] -= 1e3
    inputs = x, noise("weight", 64), noise("bias", 64), 8, 1e-5
    named = {"shift": optional("shift", shifts, 64), "frames": 1, "lost": 1e3}
    check(form, kernels.group_norm, group_norm_formula, torch.float32, *inputs, **named)


@both_forms
def test_group_norm_of_a_constant(form):
    """No variance: the result is the bias, with what the mean lost times 1 / sqrt(eps)."""
    x = torch.full((2, 50, 64), 3.3, device=form[1])
    weight, bias = torch.ones(64, device=form[1]), torch.arange(64.0, device=form[1])
    with kernels.use(form[0]):
        out = kernels.group_norm(x, weight, bias, 8, 1e-6)
    assert (out - bias).abs().max() < 5e-3


@triton_form
def test_group_norm_over_long_stretches(form, monkeypatch):
    """Loops that small inputs go through once; the last stretch is shorter than the others."""
    from sgm.kernels.fused import group_norms, tiles

    monkeypatch.setattr(tiles, "_PROGRAMS", 16)
    monkeypatch.setattr(group_norms, "_MERGED_AT_ONCE", 64)
    for n, s, c in ((2, 1000, 32), (2, 70, 640)):
        inputs = noise("x", n, s, c), noise("weight", c), noise("bias", c), 8, 1e-5
        named = {"shift": noise("shift", n, c), "frames": 2, "silu": True}
        check(form, kernels.group_norm, group_norm_formula, torch.float32, *inputs, **named)


# --- LayerNorm -----------------------------------------------------------------------------------


def layer_norm_formula(x, delta, shift, weight, bias, eps):
    total = shifted(x if delta is None else x + delta, shift)
    mean = total.sum(2, keepdim=True) / x.shape[2]
    variance = ((total - mean) ** 2).sum(2, keepdim=True) / x.shape[2]
    return total, (total - mean) / torch.sqrt(variance + eps) * weight + bias


@both_forms
@pytest.mark.parametrize(
    ("n", "s", "c", "has_delta", "shifts"),
    [
        (4, 70, 96, True, 2),
        (4, 7, 96, True, 0),
        (6, 1, 320, False, 3),
        (3, 5, 64, False, 0),
        (2, 3, 2500, True, 1),
    ],
)
def test_residual_layer_norm(form, n, s, c, has_delta, shifts):
    delta = noise("delta", n, s, c) if has_delta else None
    inputs = noise("x", n, s, c), delta, optional("shift", shifts, c), noise("w", c), noise("b", c)
    check(form, kernels.residual_layer_norm, layer_norm_formula, torch.float32, *inputs, 1e-5)


@both_forms
@all_dtypes
def test_residual_layer_norm_in_all_types(form, dtype):
    x, delta, shift = noise("x", 4, 30, 96), noise("delta", 4, 30, 96), noise("shift", 2, 96)
    inputs = x, delta, shift, noise("weight", 96), noise("bias", 96), 1e-5
    check(form, kernels.residual_layer_norm, layer_norm_formula, dtype, *inputs)


@both_forms
def test_residual_layer_norm_of_a_large_mean(form):
    inputs = noise("x", 2, 7, 96) + 1e3, None, None, noise("weight", 96), noise("bias", 96), 1e-5
    formula = layer_norm_formula
    check(form, kernels.residual_layer_norm, formula, torch.float32, *inputs, lost=1e3)


def test_a_sum_of_nothing_is_the_input():
    x = noise("x", 2, 3, 32)
    total, _ = kernels.residual_layer_norm(x, None, None, noise("w", 32), noise("b", 32), 1e-5)
    assert total is x


# --- GEGLU ---------------------------------------------------------------------------------------


def geglu_formula(x, scale=1):
    half = x.shape[-1] // 2
    value, gate = x[..., :half], x[..., half:]
    return value * 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2))) * scale


@both_forms
@all_dtypes
@pytest.mark.parametrize("scaled", [False, True])
def test_geglu(form, dtype, scaled):
    for shape in ((4, 33, 200), (1, 1, 64), (70, 256)):
        scale = {"scale": noise("scale", shape[-1] // 2)} if scaled else {}
        check(form, kernels.geglu, geglu_formula, dtype, 3 * noise("x", *shape), **scale)


@both_forms
def test_results_in_8_bits(form):
    """The norm alone is rounded, not the sum; e4m3 has three bits behind the point."""
    x, delta = noise("x", 3, 33, 96), noise("delta", 3, 33, 96)
    affine = 40 + noise("weight", 96), noise("bias", 96), 1e-5
    scale = 20 + noise("scale", 48)
    expected = [*layer_norm_formula(x, delta, None, *affine), geglu_formula(x, scale)]
    # The interpreter loses the carry where e4m3 rounds up to a power of two.
    narrow = torch.float16 if INTERPRETED else torch.float8_e4m3fn
    x, delta, weight, bias, scale = (y.to(form[1]) for y in (x, delta, *affine[:2], scale))
    with kernels.use(form[0]):
        outs = kernels.residual_layer_norm(x, delta, None, weight, bias, 1e-5, narrow)
        outs = [*outs, kernels.geglu(x, scale, narrow)]
    assert [out.dtype for out in outs] == [torch.float32, narrow, narrow]
    for out, value, limit in zip(outs, expected, (1e-6, 2**-4, 2**-4), strict=True):
        error = (out.cpu().float() - value).abs() / (value.abs() + 1)
        assert error.max() < 1.1 * limit


# --- Blend ---------------------------------------------------------------------------------------


def blend_formula(x, y, delta, shift, alpha):
    if not isinstance(alpha, Tensor):
        alpha = torch.full((len(x),), alpha, dtype=torch.float64, device=x.device)
    a = alpha[:, None, None]
    return shifted(a * x + (1 - a) * (y + (0 if delta is None else delta)), shift)


@both_forms
@all_dtypes
@pytest.mark.parametrize("alpha", [0.3, torch.tensor([0.25, 1.0, 0.75, 1.0])], ids=["all", "rows"])
def test_blend(form, dtype, alpha):
    x, y, delta = (noise(name, 4, 70, 96) for name in ("x", "y", "delta"))
    for addends in ((delta, noise("shift", 2, 96)), (delta, None), (None, noise("shift", 4, 96))):
        check(form, kernels.blend, blend_formula, dtype, x, y, *addends, alpha)


@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_image_rows_pass_as_they_are(form, dtype):
    """To the bit, whatever overflowed in the temporal branch."""
    x, y = (noise(name, 2, 5, 32).to(form[1], dtype) for name in ("x", "y"))
    y[0] = 1e5 if INTERPRETED else math.inf  # the interpreter warns of inf - inf
    with kernels.use(form[0]):
        out = kernels.blend(x, y, y, None, torch.tensor([1, 0.5], device=form[1]))
    assert torch.equal(out[0], x[0])
    assert out[1].isfinite().all()


@triton_form
def test_pointwise_over_long_stretches(form, monkeypatch):
    from sgm.kernels.fused import tiles

    monkeypatch.setattr(tiles, "_PROGRAMS", 4)
    x, y = noise("x", 2, 300, 32), noise("y", 2, 300, 32)
    check(form, kernels.blend, blend_formula, torch.float32, x, y, y, noise("shift", 2, 32), 0.4)
    check(form, kernels.geglu, geglu_formula, torch.float32, x, noise("scale", 16))


# --- Temporal attention --------------------------------------------------------------------------


def attention_formula(qkv, heads, frames):
    n, s, width = qkv.shape
    d = width // (3 * heads)
    out = qkv.new_zeros(n, s, heads * d)
    for first in range(0, n, frames):
        for head in range(heads):
            clip = qkv[first : first + frames]
            q, k, v = (clip[..., (i * heads + head) * d :][..., :d] for i in range(3))
            scores = torch.einsum("isd,jsd->sij", q, k) / math.sqrt(d)
            weights = torch.exp(scores) / torch.exp(scores).sum(-1, keepdim=True)
            mixed = torch.einsum("sij,jsd->isd", weights, v)
            out[first : first + frames, :, head * d : (head + 1) * d] = mixed
    return out


@both_forms
@all_dtypes
@pytest.mark.parametrize(
    ("clips", "frames", "s", "heads", "d"),
    [(2, 4, 6, 3, 64), (1, 25, 3, 2, 64), (2, 1, 3, 2, 16), (1, 14, 1, 1, 8), (2, 33, 2, 2, 40)],
)
def test_temporal_attention(form, dtype, clips, frames, s, heads, d):
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies the bits of bfloat16 matrices as integers")
    qkv = 2 * noise("qkv", clips * frames, s, 3 * heads * d)
    check(form, kernels.temporal_attention, attention_formula, dtype, qkv, heads, frames)


@both_forms
@all_dtypes
@pytest.mark.parametrize(("n", "s", "heads", "d"), [(2, 70, 3, 64), (3, 33, 1, 40), (1, 1, 2, 8)])
def test_spatial_attention(form, dtype, n, s, heads, d):
    def formula(qkv, heads):
        return attention_formula(qkv.transpose(0, 1), heads, s).transpose(0, 1)

    qkv = 2 * noise("qkv", n, s, 3 * heads * d)
    check(form, kernels.spatial_attention, formula, dtype, qkv, heads)


@both_forms
@pytest.mark.parametrize(("frames", "d"), [(128, 16), (130, 16), (3, 130)])
def test_temporal_attention_at_its_limits(form, frames, d):
    qkv = noise("qkv", frames, 2, 3 * d)
    check(form, kernels.temporal_attention, attention_formula, torch.float16, qkv, 1, frames)


# --- All of them ---------------------------------------------------------------------------------


@both_forms
def test_parts_of_other_tensors_are_taken(form):
    """Shifts cut out of a wider table, and tokens that are not contiguous."""
    table = noise("table", 4, 300)
    x, y = noise("x", 96, 5, 4).permute(2, 1, 0), noise("y", 4, 5, 192)[..., ::2]
    affine = noise("weight", 96), noise("bias", 96)
    for shift in (table[:, 100:196], table[:2, :192:2]):
        check(form, kernels.blend, blend_formula, torch.float32, x, y, y, shift, 0.5)
        norm = kernels.residual_layer_norm, layer_norm_formula
        check(form, *norm, torch.float32, x, y, shift, *affine, 1e-5)
        norm = kernels.group_norm, group_norm_formula
        check(form, *norm, torch.float32, x, *affine, 8, 1e-5, shift=shift)


@both_forms
def test_inputs_are_left_alone(form):
    """Catches: a sum made in place of something that is not the function's own."""
    x, y, delta = (noise(name, 2, 5, 64).float().to(form[1]) for name in ("x", "y", "delta"))
    shift, weight = noise("shift", 2, 64).float().to(form[1]), torch.ones(64, device=form[1])
    before = [v.clone() for v in (x, y, delta, shift)]
    with kernels.use(form[0]):
        for addends in ((delta, shift), (None, shift), (delta, None)):
            kernels.blend(x, y, *addends, 0.5)
            kernels.residual_layer_norm(x, *addends, weight, weight, 1e-5)
        kernels.group_norm(x, weight, weight, 8, 1e-5, shift=shift, silu=True)
        kernels.group_norm(x, weight, weight, 8, 1e-5, silu=True)
        kernels.geglu(x, weight[:32])
        kernels.geglu(x)
    assert all(map(torch.equal, (x, y, delta, shift), before))


@triton_form
def test_sizes_are_what_the_triton_form_gives(form):
    """Memory is counted by them. Catches: a shape or type of another; the input copied for a sum of
    nothing."""
    x, vector = noise("x", 4, 6, 64).half().to(form[1]), torch.ones(64).half().to(form[1])
    e4m3 = torch.float8_e4m3fn

    def run(form, x, vector):
        with kernels.use(form):
            outs = [
                kernels.group_norm(x, vector, vector, 8, 1e-5),
                kernels.blend(x, x, x, None, 0.5),
                kernels.geglu(x),
                kernels.geglu(x, vector[:32], e4m3),
                kernels.temporal_attention(torch.cat([x, x, x], -1), 4, 2),
                *kernels.residual_layer_norm(x, x, None, vector, vector, 1e-5, e4m3),
            ]
            total, normed = kernels.residual_layer_norm(x, None, None, vector, vector, 1e-5)
        assert total is x
        return [(out.shape, out.dtype, out.stride()) for out in (*outs, normed)]

    assert run("sizes", x.to("meta"), vector.to("meta")) == run(form[0], x, vector)


@real_form
def test_at_full_size(form):
    """The finest level of a guided step, 25 frames of 576x1024, in float16."""
    n, s, c = 50, 72 * 128, 320
    x, y, shift = noise("x", n, s, c), noise("y", n, s, c), noise("shift", 25, c)
    affine = noise("weight", c), noise("bias", c)
    norm = kernels.group_norm, group_norm_formula, torch.float16, x, *affine, 32, 1e-5
    check(form, *norm, shift=shift, frames=25, silu=True)
    norm = kernels.residual_layer_norm, layer_norm_formula, torch.float16
    check(form, *norm, x, y, shift, *affine, 1e-5)
    check(form, kernels.blend, blend_formula, torch.float16, x, y, y, shift, 0.3)
    check(form, kernels.geglu, geglu_formula, torch.float16, x.view(5, s, 10 * c))
    qkv = noise("qkv", n, s // 4, 3 * c)
    check(form, kernels.temporal_attention, attention_formula, torch.float16, qkv, 5, 25)


@real_form
def test_more_values_than_32_bits_count(form):
    """The end of 2.4 billion values is computed like the same values by themselves."""
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of GPU memory")
    c = 768
    x = torch.randn(3, 1 << 20, c, device=form[1], dtype=torch.float16)
    one, zero = torch.ones(c).to(x), torch.zeros(c).to(x)

    def last_row(x):
        yield kernels.group_norm(x, one, zero, 32, 1e-5)[-1]
        yield from (out[-1] for out in kernels.residual_layer_norm(x, x, None, one, zero, 1e-5))
        yield kernels.geglu(x)[-1]
        yield kernels.blend(x, x, x, None, 0.5)[-1]

    with kernels.use(form[0]):
        for out, alone in zip(last_row(x), last_row(x[-1:].clone()), strict=True):
            assert relative_error(out[-9999:], alone[-9999:]) < 1e-3
        out = kernels.temporal_attention(x, 4, 3)[:, -9999:]
        assert relative_error(out, kernels.temporal_attention(x[:, -9999:], 4, 3)) < 1e-3


@real_form
def test_in_a_cuda_graph(form):
    """Catches: a wait for the device, a tensor of the host, memory from outside of the graph."""
    x, qkv = noise("x", 4, 70, 96).to(form[1]), noise("qkv", 4, 70, 288).to(form[1]).half()
    vector, shift = noise("vector", 96).to(form[1]), noise("shift", 2, 96).to(form[1])
    alpha = torch.tensor([0.3, 1.0, 0.5, 1.0], device=form[1])

    def run():
        normed = kernels.group_norm(x, vector, vector, 32, 1e-5, shift=shift, frames=2, silu=True)
        total, out = kernels.residual_layer_norm(x, normed, shift, vector, vector, 1e-5)
        mixed = kernels.blend(total, out, x, shift, alpha)
        return kernels.geglu(mixed, vector[:48]), kernels.temporal_attention(qkv, 4, 2)

    with kernels.use(form[0]):
        run()  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        x.mul_(-2)
        qkv.mul_(-2)
        graph.replay()
        for out, expected in zip(captured, run(), strict=True):
            assert torch.equal(out, expected)


@pytest.mark.skipif(INTERPRETED or CUDA, reason="the Triton form is tested here as it is")
def test_in_triton():
    """All tests of the Triton form, in its interpreter."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-k", "interpreter", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
