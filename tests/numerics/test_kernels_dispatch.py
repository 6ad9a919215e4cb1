"""Which form of ``sgm.kernels`` runs, what it refuses, and that Triton compiles its own."""

import logging
import re
import subprocess
import sys

import pytest
import torch

from sgm import kernels
from sgm.kernels import dispatch, reference

CUDA = torch.cuda.is_available()


def test_the_cpu_never_imports_triton():
    code = (
        "import sys, torch; from sgm import kernels;"
        "kernels.geglu(torch.ones(1, 1, 2)); print('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def raise_inside(form):
    with kernels.use(form):
        raise KeyError


def test_forms_are_forced_and_released():
    fused = pytest.importorskip("sgm.kernels.fused", exc_type=ImportError)
    x = torch.ones(1, 1, 2)
    assert dispatch.form_for(x) is reference
    with kernels.use("triton"):
        assert dispatch.form_for(x) is fused
        with kernels.use("reference"):
            assert dispatch.form_for(x) is reference
        with kernels.use(None):
            assert dispatch.form_for(x) is reference
        with pytest.raises(KeyError):
            raise_inside("reference")
        assert dispatch.form_for(x) is fused
    assert dispatch.form_for(x) is reference


def test_triton_gets_what_it_is_good_at():
    fused = pytest.importorskip("sgm.kernels.fused", exc_type=ImportError)
    half = torch.ones(1, dtype=torch.float16)
    with kernels.use("triton"):
        assert dispatch.form_for(half.double()) is reference
        assert dispatch.form_for(half.bfloat16()) is fused
        assert dispatch.attention_form_for(half, 128, 128) is fused
        assert dispatch.attention_form_for(half, 129, 64) is reference
        assert dispatch.attention_form_for(half, 14, 129) is reference
        assert dispatch.attention_form_for(half.float(), 14, 64) is reference


def test_an_unknown_form_is_refused():
    expected = "expected reference, triton, sizes or None, got 'cuda'"
    with pytest.raises(ValueError, match=expected), kernels.use("cuda"):
        pass


@pytest.mark.skipif(CUDA, reason="Triton works here")
def test_pytorch_takes_the_place_of_a_triton_that_fails(caplog):
    """Here it finds no GPU; elsewhere, say, no C compiler."""
    with caplog.at_level(logging.WARNING):
        assert not dispatch.triton_works.__wrapped__(torch.device("cpu"))
    assert "Triton does not work here, PyTorch takes its place (slower):" in caplog.text


def test_a_lack_of_memory_says_nothing_of_triton(monkeypatch):
    """Catches: Triton given up for the whole process, where a smaller memory plan goes on."""

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch, "ones", full)
    with pytest.raises(torch.OutOfMemoryError):
        dispatch.triton_works.__wrapped__(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_a_gpu_gets_triton():
    x = torch.ones(1, 1, 2, device="cuda", dtype=torch.float16)
    assert dispatch.form_for(x).__name__ == "sgm.kernels.fused"
    assert dispatch.form_for(x.double()) is reference


X, V = torch.zeros(4, 5, 96), torch.zeros(96)
ROWS = torch.zeros(3, 96)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels.group_norm(X, V, V, 5, 1e-5), "divisible by 5 groups, got 96"),
        (lambda: kernels.group_norm(X, V, V, 8, 1e-5, frames=3), "clips of 3 frames, got 4"),
        (lambda: kernels.group_norm(X, V, V[1:], 8, 1e-5), "of shape (96,), got (95,)"),
        (lambda: kernels.group_norm(X, V, V, 8, 1e-5, shift=ROWS), "of 4, 96), got (3, 96)"),
        (lambda: kernels.group_norm(X, V, V, 8, 1e-5, shift=V), "of 4, 96), got (96,)"),
        (
            lambda: kernels.residual_layer_norm(X, X[1:], None, V, V, 1e-5),
            "of shape (4, 5, 96), got (3, 5, 96)",
        ),
        (
            lambda: kernels.residual_layer_norm(X, None, ROWS[:2, 1:], V, V, 1e-5),
            "of 4, 96), got (2, 95)",
        ),
        (lambda: kernels.residual_layer_norm(X, None, None, V[1:], V, 1e-5), "got (95,)"),
        (lambda: kernels.geglu(X[..., 1:]), "an even number of channels, got 95"),
        (lambda: kernels.geglu(X, V[1:]), "a scale of shape (48,), got (95,)"),
        (lambda: kernels.blend(X, X[:, 1:], None, None, 0.5), "got (4, 4, 96)"),
        (lambda: kernels.blend(X, X, None, ROWS, 0.5), "of 4, 96), got (3, 96)"),
        (lambda: kernels.blend(X, X, None, None, V), "alpha of shape (4,), got (96,)"),
        (lambda: kernels.temporal_attention(X, 5, 2), "divisible by 3 x 5 heads, got 96"),
        (lambda: kernels.temporal_attention(X, 4, 3), "clips of 3 frames, got 4"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call, message):
    """A Triton kernel would read beyond the end of a tensor."""
    with pytest.raises(ValueError, match=f"^expected .*{re.escape(message)}$"):
        call()


class Gpu:
    """What Triton asks of a GPU before it compiles for it."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return f"a device of {self.target}"

    def get_current_stream(self, device):  # noqa: ARG002 - Triton's signature
        return 0


def call_all(n, s, c, heads, dtype):
    """Each function without and with what may be left out."""
    x, vector, qkv = (torch.zeros(*size, dtype=dtype) for size in ((n, s, c), (c,), (n, s, 3 * c)))
    shift = x[:, 0]
    kernels.group_norm(x, vector, vector, min(32, c), 1e-5)
    kernels.group_norm(x, vector, vector, min(32, c), 1e-5, shift=shift, frames=n, silu=True)
    kernels.residual_layer_norm(x, None, None, vector, vector, 1e-5)
    kernels.residual_layer_norm(x, x, shift, vector, vector, 1e-5)
    kernels.blend(x, x, None, None, 0.5)
    kernels.blend(x, x, x, shift, x[:, 0, 0])
    kernels.geglu(qkv[..., : 2 * c])
    kernels.geglu(qkv[..., : 2 * c], qkv[0, 0, :c])
    kernels.temporal_attention(qkv, heads, n)


def call_with_8_bits(n, s, c, dtype):
    x, vector = torch.zeros(n, s, 2 * c, dtype=dtype), torch.zeros(2 * c, dtype=dtype)
    kernels.residual_layer_norm(x, x, None, vector, vector, 1e-5, torch.float8_e4m3fn)
    kernels.geglu(x, vector[:c], torch.float8_e4m3fn)


@pytest.mark.skipif(CUDA, reason="the kernels run here")
@pytest.mark.parametrize(
    ("capability", "dtype"), [(80, torch.float32), (90, torch.bfloat16)], ids=str
)
def test_triton_compiles_its_form(capability, dtype, monkeypatch, tmp_path):
    """To the machine code of a GPU that is not there: the interpreter forgives more.

    Sizes of 1 are programs of their own: Triton takes them as constants.
    """
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    compile_and_run, compiled = JITFunction.run, []

    def compile_alone(self, *args, warmup, **kwargs):
        compiled.append(compile_and_run(self, *args, warmup=True, **kwargs))

    monkeypatch.setattr(JITFunction, "run", compile_alone)
    monkeypatch.setattr(driver, "_active", Gpu(GPUTarget("cuda", capability, 32)))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with kernels.use("triton"):
        call_all(25, 30, 320, 5, dtype)
        call_all(1, 1, 1, 1, dtype)
        expected = 2 * (3 + 3 + 2 + 2 + 2)
        if capability == 90:
            call_with_8_bits(25, 30, 320, dtype)
            expected += 2 + 2  # and attention, twice
    assert len(compiled) == expected
    assert all(kernel.asm["cubin"] for kernel in compiled)
