"""Checkpoints: real files of every kind into small models; damage and misfits are ValueErrors."""

import gzip
import hashlib
import json
import os
import random
import struct
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sgm.checkpoint import identify, load_checkpoint, open_checkpoint, read_state_dict, sha256_of

KEYS = Path(__file__).parents[1] / "data/keys"
WRITERS = {
    ".safetensors": save_file,
    ".ckpt": lambda tensors, path: torch.save({"state_dict": tensors, "epoch": 3}, path),
    ".pt": torch.save,
}


class Tiny(nn.Module):
    """A frozen part, a trained part, a persistent buffer and a constant that no file holds."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.frozen = nn.Conv2d(2, 2, 1).requires_grad_(False)
        self.register_buffer("steps", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("mean", torch.tensor([0.5], device="cpu"), persistent=False)


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "body.weight": torch.randn(4, 3, generator=generator).half(),
        "body.bias": torch.randn(4, generator=generator).half(),
        "frozen.weight": torch.randn(2, 2, 1, 1, generator=generator).half(),
        "frozen.bias": torch.randn(2, generator=generator).half(),
        "steps": torch.tensor([7, 2**40 + 1]),
    }


def on_meta() -> Tiny:
    with torch.device("meta"):
        return Tiny()


def written(folder: Path, tensors: dict[str, torch.Tensor], suffix: str = ".safetensors") -> Path:
    path = folder / f"weights{suffix}"
    WRITERS[suffix](tensors, path)
    return path


def frozen_shapes(name: str) -> dict[str, list[int]]:
    return json.loads(gzip.decompress((KEYS / f"{name}.json.gz").read_bytes()))


# --- loading what fits ---


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_written_values(tmp_path: Path, suffix: str):
    # Catches: a lost dtype, a transposed or shifted view, the trainable flag reset on assignment.
    model = on_meta()
    report = load_checkpoint(model, written(tmp_path, weights(), suffix))
    state = model.state_dict()
    assert state.keys() == weights().keys() == set(report.loaded)
    for key, value in weights().items():
        assert state[key].dtype == value.dtype
        assert torch.equal(state[key], value)
    assert report.dtype == torch.float16
    assert report.fits
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "body.weight",
        "body.bias",
    }
    assert torch.equal(model.mean, torch.tensor([0.5]))


def test_conversion_touches_floating_point_alone(tmp_path: Path):
    # Catches: converting integers too (2**40 + 1 has no bfloat16), or leaving some weights alone.
    model = on_meta()
    load_checkpoint(model, written(tmp_path, weights()), dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.steps.tolist() == [7, 2**40 + 1]
    assert torch.equal(model.body.weight, weights()["body.weight"].bfloat16())


def test_a_model_with_values_loads_alike(tmp_path: Path):
    model = Tiny()
    load_checkpoint(model, written(tmp_path, weights()))
    assert torch.equal(model.body.weight, weights()["body.weight"])


@pytest.mark.parametrize("prefix", ["engine.", "module.", "_forward_module.engine."])
def test_training_wrappers_are_taken_off(tmp_path: Path, prefix: str):
    model = on_meta()
    wrapped = {prefix + key: value for key, value in weights().items()}
    wrapped[f"{prefix}loss_fn.weight"] = torch.ones(1)
    report = load_checkpoint(model, written(tmp_path, wrapped, ".ckpt"))
    assert torch.equal(model.body.bias, weights()["body.bias"])
    assert report.ignored == ("loss_fn.weight",)


def test_a_weight_that_is_there_twice_is_refused(tmp_path: Path):
    # Catches: one of two different values taken silently.
    twice = weights() | {"engine.steps": torch.tensor([1, 1])}
    with pytest.raises(ValueError, match="twice"):
        load_checkpoint(on_meta(), written(tmp_path, twice))


CLIP = "conditioner.embedders.0.open_clip.model"


@pytest.mark.parametrize(
    "key",
    [
        "model_ema.bodyweight",
        "loss.logvar",
        "first_stage_model.loss.discriminator.main.0.weight",
        "denoiser.sigmas",
        f"{CLIP}.attn_mask",
        f"{CLIP}.positional_embedding",
        f"{CLIP}.text_projection",
        f"{CLIP}.logit_scale",
        f"{CLIP}.token_embedding.weight",
        f"{CLIP}.ln_final.bias",
        "conditioner.embedders.2.model.logit_scale",
    ],
)
def test_what_is_no_weight_is_ignored_by_name(tmp_path: Path, key: str):
    report = load_checkpoint(on_meta(), written(tmp_path, weights() | {key: torch.ones(1)}))
    assert report.ignored == (key,)


@pytest.mark.parametrize(
    "key",
    [
        f"{CLIP}.visual.positional_embedding",
        f"{CLIP}.transformer.resblocks.0.ln_1.weight",
        "model.diffusion_model.lossy.weight",
        "conditioner.embedders.3.sigmas",
    ],
)
def test_what_resembles_an_ignored_name_is_not_ignored(tmp_path: Path, key: str):
    # Catches: a pattern without its dots or anchors.
    with pytest.raises(ValueError, match="1 key unexpected"):
        load_checkpoint(on_meta(), written(tmp_path, weights() | {key: torch.ones(1)}))


def test_an_ignored_name_that_the_model_has_is_loaded(tmp_path: Path):
    # Catches: ignoring before matching; and demanding loss weights of a file made for sampling.
    class WithLoss(Tiny):
        def __init__(self):
            super().__init__()
            self.loss = nn.Linear(1, 1, bias=False)

    model = WithLoss()
    own = model.loss.weight.item()
    load_checkpoint(model, written(tmp_path, weights()))
    assert model.loss.weight.item() == own
    load_checkpoint(model, written(tmp_path, weights() | {"loss.weight": torch.tensor([[2.5]])}))
    assert model.loss.weight.item() == 2.5


# --- what does not fit ---


def test_every_misfit_is_in_one_message(tmp_path: Path):
    tensors = weights() | {f"extra.{i}": torch.ones(1) for i in range(5)}
    tensors["body.weight"] = tensors["body.weight"].T.contiguous()
    del tensors["frozen.bias"]
    with pytest.raises(ValueError, match="does not fit the model") as caught:
        load_checkpoint(on_meta(), written(tmp_path, tensors))
    message = str(caught.value)
    assert "\n" not in message
    assert str(tmp_path / "weights.safetensors") in message
    assert "1 key missing (frozen.bias)" in message
    assert "5 keys unexpected (extra.0, extra.1, extra.2, ...)" in message
    assert "(body.weight: [3, 4] in the file, [4, 3] in the model)" in message
    assert "no model known here" in message


def test_a_misfit_changes_nothing(tmp_path: Path):
    # Catches: assigning before checking.
    model, tensors = Tiny(), weights()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    del tensors["steps"]
    with pytest.raises(ValueError, match="1 key missing"):
        load_checkpoint(model, written(tmp_path, tensors))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_another_model_s_file_is_called_by_its_name(tmp_path: Path):
    class Wide(nn.Module):
        """The keys by which the model is known, at their full shapes."""

        def __init__(self, vector: int):
            super().__init__()
            self.shapes = frozen_shapes("svd")
            for key in ("input_blocks.0.0.weight", "label_emb.0.0.weight"):
                self.add(f"model.diffusion_model.{key}", vector)
            self.add("model.diffusion_model.input_blocks.1.0.time_stack.in_layers.0.weight", vector)

        def add(self, key: str, vector: int):
            shape = [vector if size == 768 else size for size in self.shapes[key]]
            parent: nn.Module = self
            *path, leaf = key.split(".")
            for name in path:
                if not hasattr(parent, name):
                    parent.add_module(name, nn.Module())
                parent = getattr(parent, name)
            parent.register_parameter(leaf, nn.Parameter(torch.zeros(shape)))

    path = written(tmp_path, Wide(256).state_dict())
    with pytest.raises(ValueError, match="looks like sv3d_u, the model is sv3d_p: change"):
        load_checkpoint(Wide(1280), path)


def test_nothing_may_stay_on_meta(tmp_path: Path):
    # Catches: an unfilled constant found only by the first forward pass.
    with torch.device("meta"):
        model = Tiny()
        model.register_buffer("std", torch.ones(1), persistent=False)
    with pytest.raises(ValueError, match=r"1 key without values \(std\)"):
        load_checkpoint(model, written(tmp_path, weights()), device="cpu")


# --- identification ---


@pytest.mark.parametrize(
    ("name", "models"),
    [
        ("svd", ("svd", "svd_xt", "svd_xt_1_1")),
        ("svd_image_decoder", ("svd_image_decoder", "svd_xt_image_decoder")),
        ("sv3d_u", ("sv3d_u",)),
        ("sv3d_p", ("sv3d_p",)),
    ],
)
def test_published_architectures_are_told_apart(name: str, models: tuple[str, ...]):
    shapes = frozen_shapes(name)
    assert identify(shapes) == models
    small = {key: [max(size // 10, 1) for size in shape] for key, shape in shapes.items()}
    assert identify(small) == ("svd_tiny",)


def image_model(context: int) -> dict[str, tuple[int, ...]]:
    block = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0"
    return {f"{block}.attn2.to_q.weight": (320, 320), f"{block}.attn2.to_k.weight": (320, context)}


@pytest.mark.parametrize(
    ("shapes", "phrase"),
    [
        (image_model(768), "Stable Diffusion 1.x"),
        (image_model(1024), "Stable Diffusion 2.x"),
        (image_model(2048), "Stable Diffusion XL"),
        (image_model(77), "a Stable Diffusion image model"),
        (
            frozen_shapes("sv3d_p")
            | {"model.diffusion_model.input_blocks.1.0.time_mix_blocks.in_layers.0.weight": (320,)},
            "SV4D",
        ),
        ({"lora_unet_mid_block_attn.lora_down.weight": (4, 320)}, "LoRA"),
        ({"unet.mid_block.to_q.lora_A.weight": (4, 320)}, "LoRA"),
        ({"conv_in.weight": (320, 4, 3, 3), "down_blocks.0.conv.bias": (1,)}, "diffusers image"),
        (
            {"down_blocks.0.attentions.0.temporal_transformer_blocks.0.norm1.bias": (320,)},
            "diffusers SVD",
        ),
        ({"encoder.conv_in.bias": (1,), "encoder.down_blocks.0.x": (1,)}, "diffusers autoencoder"),
        ({"decoder.conv_in.bias": (1,), "decoder.up.0.block.0.norm1.bias": (1,)}, "autoencoder al"),
        ({"vision_model.post_layernorm.bias": (1280,)}, "transformers"),
        ({"visual.proj": (1280, 1024)}, "OpenCLIP"),
    ],
)
def test_foreign_weights_are_named(shapes: dict[str, tuple[int, ...]], phrase: str):
    assert phrase in " ".join(identify(shapes))


def test_unknown_weights_have_no_name():
    assert identify({"exploration.weight": (1,)}) == identify({}) == ()


# --- files that cannot be read ---


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_truncation_is_a_value_error(tmp_path: Path, suffix: str):
    # Catches: a parser's own exception passed on, or a mapping that ends early (a crash when used).
    whole = written(tmp_path, weights(), suffix).read_bytes()
    cut = tmp_path / f"cut{suffix}"
    for length in (0, 1, 8, len(whole) - 1, *random.Random(0).sample(range(len(whole)), 40)):
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cannot be loaded") as caught:
            read_state_dict(cut)
        assert str(cut) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_bytes_are_a_value_error_or_still_tensors(tmp_path: Path, suffix: str):
    whole = written(tmp_path, weights(), suffix).read_bytes()
    path, rng = tmp_path / f"damaged{suffix}", random.Random(0)
    messages = []
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 4, 16))):
            damaged[rng.randrange(len(whole))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            for tensor in read_state_dict(path).values():
                tensor.clone()  # every byte can be read
        except ValueError as error:
            messages.append(str(error))
    assert messages
    assert all(str(path) in message and "\n" not in message for message in messages)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        ("a.safetensors", b"<!DOCTYPE html><title>Sign in</title>", "a web page"),
        ("a.ckpt", b"<HTML>", "a web page"),
        ("a.safetensors", b"plain text, and long enough to hold a length", "not a .safetensors"),
        ("a.gguf", b"GGUF", r"ending in \.safetensors, \.ckpt"),
        ("a.safetensors", struct.pack("<Q", 2) + b"{}", "holds no tensors"),
    ],
)
def test_foreign_files_are_named(tmp_path: Path, name: str, content: bytes, message: str):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_state_dict(path)
    assert str(path) in str(caught.value)


def test_absent_files_and_folders_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match="is not there"):
        read_state_dict(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="is a folder"):
        read_state_dict(tmp_path)


class Payload:
    """Creates a file when unpickled as pickle would."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_code_of_a_file_is_run(tmp_path: Path):
    torch.save({"a": torch.ones(1), "b": Payload(tmp_path / "owned")}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match="Python objects besides tensors"):
        read_state_dict(tmp_path / "evil.ckpt")
    assert not (tmp_path / "owned").exists()


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_tensors_that_cannot_be_mapped_are_named(tmp_path: Path):
    torch.save({"x": torch.ones(3), "odd": torch.ones(3).to_sparse()}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"odd is sparse or quantised"):
        read_state_dict(tmp_path / "x.ckpt")


def test_numbers_are_names_too(tmp_path: Path):
    # As the state of an optimizer has them.
    torch.save({1: torch.ones(3)}, tmp_path / "x.ckpt")
    assert open_checkpoint(tmp_path / "x.ckpt").tensors.keys() == {"1"}


def test_torch_s_old_format_is_read(tmp_path: Path):
    path = tmp_path / "old.pt"
    torch.save(weights(), path, _use_new_zipfile_serialization=False)
    assert torch.equal(read_state_dict(path)["body.weight"], weights()["body.weight"])


@pytest.mark.parametrize("padding", range(4))
def test_unaligned_tensors_are_copied_to_aligned_memory(tmp_path: Path, padding: int):
    # Catches: float32 views at odd addresses, which vector instructions may refuse.
    values = torch.arange(5.0)
    header = json.dumps({"x": {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}}).encode()
    header += b" " * padding
    path = tmp_path / "odd.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + values.numpy().tobytes())
    x = read_state_dict(path)["x"]
    assert x.data_ptr() % 4 == 0
    assert torch.equal(x, values)


# --- memory ---

MAPS = Path("/proc/self/maps")


@pytest.mark.skipif(not MAPS.exists(), reason="needs Linux's list of memory mappings")
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_parameters_are_views_of_the_mapped_file(tmp_path: Path, suffix: str):
    # Catches: a copy made by the reader, by the assignment or by a needless conversion.
    def resident(kind: str) -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition(f"{kind}:")[2].split()[0]) // 1024  # MiB

    with torch.device("meta"):
        model = nn.Linear(7_000, 7_000, bias=False, dtype=torch.float16)
    path = written(tmp_path, {"weight": torch.zeros(7_000, 7_000).half()}, suffix)
    before = resident("RssAnon")
    load_checkpoint(model, path, dtype=torch.float16, device="cpu")
    address = model.weight.data_ptr()
    spans = [
        line.split()[0].split("-") for line in MAPS.read_text().splitlines() if str(path) in line
    ]
    assert any(int(low, 16) <= address < int(high, 16) for low, high in spans)
    assert float(model.weight.detach().view(torch.int16).amax()) == 0  # reads all of it
    assert resident("RssAnon") - before < 20  # of 93


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_writing_to_a_parameter_leaves_the_file_alone(tmp_path: Path, suffix: str):
    # Catches: a shared mapping, by which a training step would overwrite the user's checkpoint.
    path, model = written(tmp_path, weights(), suffix), on_meta()
    before = path.read_bytes()
    load_checkpoint(model, path)
    with torch.no_grad():
        model.body.weight.zero_()
    assert path.read_bytes() == before


# --- digests ---


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SGM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_digest_is_right_and_remembered(tmp_path: Path, cache: Path):
    path = tmp_path / "file"
    path.write_bytes(random.Random(0).randbytes((9 << 20) + 5))  # more than a chunk, not a multiple
    digest = sha256_of(path)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    stat = path.stat()
    (note,) = (cache / "sha256").iterdir()
    path.write_bytes(bytes(stat.st_size))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert sha256_of(path) == digest  # remembered: same path, size and time
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert sha256_of(path) == hashlib.sha256(bytes(stat.st_size)).hexdigest()
    note.write_text("half a dige")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert sha256_of(path) == hashlib.sha256(bytes(stat.st_size)).hexdigest()


def test_digest_survives_concurrent_callers(tmp_path: Path, cache: Path):
    path = tmp_path / "file"
    path.write_bytes(b"weights")
    found: list[str | None] = []
    threads = [threading.Thread(target=lambda: found.append(sha256_of(path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [hashlib.sha256(b"weights").hexdigest()] * 8
    assert len(list((cache / "sha256").iterdir())) == 1  # no temporary file is left


def test_digest_needs_no_writable_cache(tmp_path: Path, cache: Path):
    cache.write_text("a file where the folder should be")
    (tmp_path / "file").write_bytes(b"weights")
    assert sha256_of(tmp_path / "file") == hashlib.sha256(b"weights").hexdigest()


def test_digest_needs_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SGM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "~nosuchuser/.cache")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "file").write_bytes(b"weights")
    assert sha256_of(tmp_path / "file") == hashlib.sha256(b"weights").hexdigest()


def test_digest_can_be_cancelled(tmp_path: Path, cache: Path):
    (tmp_path / "file").write_bytes(b"weights")
    cancel = threading.Event()
    cancel.set()
    assert sha256_of(tmp_path / "file", cancel) is None
    assert sha256_of(tmp_path / "file", threading.Event()) is not None  # nothing false remembered


def test_digest_of_nothing_is_an_error(tmp_path: Path, cache: Path):
    with pytest.raises(ValueError, match="not there"):
        sha256_of(tmp_path / "none")
