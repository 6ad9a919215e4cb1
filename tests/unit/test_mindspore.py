"""MindSpore: its file format and its names, read from a file that its own library wrote.

``tests/data/mindspore/make.py`` made the file. Names are checked against the frozen keys of the
published architecture.
"""

import gzip
import io
import json
import os
import random
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sgm.checkpoint import open_checkpoint, open_native, read_state_dict
from sgm.checkpoint.mindspore_file import write_mindspore
from sgm.checkpoint.opening import convert
from sgm.checkpoint.source import each
from sgm.convert import detect
from sgm.convert.mindspore import mindspore_name, native_name

DATA = Path(__file__).parents[1] / "data"
FILE = DATA / "mindspore/parameters.ckpt"
TYPES = (torch.float16, torch.bfloat16, torch.float32)
PUBLISHED = ("svd", "svd_image_decoder", "sv3d_u", "sv3d_p")


def published(name: str = "svd") -> dict[str, list[int]]:
    return json.loads(gzip.decompress((DATA / f"keys/{name}.json.gz").read_bytes()))


def parameters() -> dict[str, torch.Tensor]:
    """The parameters of the file, without the number and the text that were added."""
    tensors = read_state_dict(FILE)
    assert tensors.pop("epoch_num").tolist() == 3
    return tensors


def field(number: int, content: bytes) -> bytes:
    """A protobuf field of bytes, shorter than 128."""
    return bytes([number << 3 | 2, len(content)]) + content


# --- the format ---


def test_every_value_of_the_real_file_is_read():
    # Catches: a wrong offset, a lost type, dimensions in the wrong order, a scalar read as empty.
    for number, (name, tensor) in enumerate(parameters().items()):
        wanted = torch.arange(tensor.numel(), dtype=torch.float64) + number / 1024
        assert tensor.dtype == TYPES[number % 3], name
        assert torch.equal(tensor.flatten(), wanted.float().to(tensor.dtype)), name


def test_texts_are_metadata():
    assert open_checkpoint(FILE).metadata == {"note": "made for tests"}


def test_what_we_write_is_what_mindspore_writes():
    # Catches: another order of fields, packed dimensions, a length that leaves something out.
    source = open_checkpoint(FILE)
    sink = io.BytesIO()
    names = [name for name in source.tensors if name != "epoch_num"]
    blanks = {name: source.tensors[name] for name in names}
    write_mindspore(sink, blanks, (source.read(name) for name in names))
    assert len(names) > 150
    assert FILE.read_bytes().startswith(sink.getvalue())


@pytest.mark.parametrize("dims", [b"\x08\x02\x08\x03", b"\x0a\x02\x02\x03"])
@pytest.mark.parametrize("tag", ["x", "xx", "xxx", "xxxx"])  # one of them aligns the values
def test_the_parts_of_a_large_tensor_are_joined(tmp_path: Path, dims: bytes, tag: str):
    # Catches: one part standing for the tensor; dimensions written packed not understood.
    values = torch.arange(6, dtype=torch.float32)
    content = values.numpy().tobytes()
    parts = [
        field(1, field(1, tag.encode()) + field(2, dims + field(2, b"Float32") + field(3, part)))
        for part in (content[:5], content[5:])
    ]
    (tmp_path / "x.ckpt").write_bytes(b"".join(parts))
    x = read_state_dict(tmp_path / "x.ckpt")[tag]
    assert torch.equal(x, values.reshape(2, 3))


def test_an_old_scalar_and_a_checksum_are_understood(tmp_path: Path):
    tensor = b"\x08\x00" + field(2, b"Float32") + field(3, struct.pack("<f", 2.5))
    message = field(1, field(1, b"scale") + field(2, tensor))
    path = tmp_path / "x.ckpt"
    path.write_bytes(message + b"crc_num" + bytes(10))
    assert read_state_dict(path)["scale"].tolist() == 2.5


def test_parts_are_written_where_a_tensor_is_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sgm.checkpoint.mindspore_file._LARGEST", 7)
    x = torch.arange(6).float()
    with (tmp_path / "x.ckpt").open("wb") as file:
        write_mindspore(file, {"x": x.to("meta")}, [x])
    assert (tmp_path / "x.ckpt").read_bytes().count(b"Float32") == 4
    assert torch.equal(read_state_dict(tmp_path / "x.ckpt")["x"], x)


@pytest.mark.parametrize(
    "positioned",
    [
        pytest.param(True, marks=pytest.mark.skipif(not hasattr(os, "preadv"), reason="Windows")),
        False,
    ],
)
def test_threads_that_copy_from_one_file_do_not_disturb_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, positioned: bool
):
    # Catches: one position of the file for all threads (Windows cannot read without it, so there
    # they have to wait for each other); results in the order in which threads finish; and a tensor
    # that the system reads in several goes (as it does those of more than 2 GB) put together wrong.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    if positioned:
        preadv = os.preadv
        monkeypatch.setattr(os, "preadv", lambda file, x, at: preadv(file, [x[0][:40_000]], at))
    else:
        monkeypatch.delattr(os, "preadv", raising=False)
    tensors = {f"x{n:03}": (torch.arange(50_000 + n) % 997 + n).half() for n in range(200)}
    path = tmp_path / "x.ckpt"
    with path.open("wb") as file:
        write_mindspore(file, tensors, tensors.values())
    names = list(reversed(tensors))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        made = each(open_checkpoint(path).view, names)
    finally:
        sys.setswitchinterval(interval)
    assert list(made) == names
    assert all(torch.equal(made[name], tensors[name]) for name in names)
    assert all(value.data_ptr() % 2 == 0 for value in made.values())


def test_a_thread_that_fails_ends_the_loading(tmp_path: Path):
    # Catches: an exception that stays in its thread, and a tensor of rubbish.
    path = tmp_path / "x.ckpt"
    x = torch.arange(5_000).half()
    with path.open("wb") as file:
        write_mindspore(file, {"x": x, "yy": x}, [x, x])  # one of them is not aligned
    source = open_checkpoint(path)
    os.truncate(path, 8)
    with pytest.raises(ValueError, match="became shorter while it was being read"):
        each(source.read, ["x", "yy"])


def test_damage_is_a_value_error_or_still_tensors(tmp_path: Path):
    whole, path, rng = FILE.read_bytes(), tmp_path / "damaged.ckpt", random.Random(0)
    messages = []
    for _ in range(40):
        damaged = bytearray(whole)
        for _ in range(64):
            damaged[rng.randrange(len(whole))] = rng.randrange(256)
        path.write_bytes(damaged if rng.random() < 0.5 else damaged[: rng.randrange(len(whole))])
        try:
            read_state_dict(path)
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 10
    assert all(str(path) in message and "\n" not in message for message in messages)


# --- the names ---


def test_the_real_names_become_published_ones():
    # Catches: a wrong row of the table; a name that the framework forms in another way.
    source = open_checkpoint(FILE)
    assert detect(source.shapes) == "mindspore"
    native = open_native(FILE)
    wanted = published()
    assert set(native.tensors) <= set(wanted)
    assert native.conversion.dropped == ("epoch_num",)
    for name, tensor in native.tensors.items():
        assert tensor.ndim == len(wanted[name]), name


def test_the_real_file_has_every_kind_of_name():
    # Or a row of the table could be missing unnoticed.
    def kinds(keys):
        return {key.rpartition(".")[2] for key in keys}

    assert kinds(open_native(FILE).tensors) == kinds(published())


@pytest.mark.parametrize("name", PUBLISHED)
def test_norms_and_nothing_else_change_their_names(name: str):
    # Of the published tensors, the weights in one dimension are those of norms.
    shapes = published(name)
    for key, shape in shapes.items():
        is_norm = key.endswith(".weight") and len(shape) == 1
        renamed = mindspore_name(key)
        assert renamed.endswith(".gamma") == is_norm, key
        assert native_name(renamed) == key
        beside = key.removesuffix("bias") + "weight"
        if key.endswith(".bias") and beside in shapes:
            assert renamed.endswith(".beta") == (len(shapes[beside]) == 1), key


def test_the_few_other_names():
    clip = "conditioner.embedders.0.open_clip.model.token_embedding"
    assert mindspore_name(f"{clip}.weight") == f"{clip}.embedding_table"
    out = "first_stage_model.decoder.conv_out"
    assert mindspore_name(f"{out}.time_mix_conv.bias") == f"{out}.conv3d.bias"
    assert native_name("model.diffusion_model._backbone.out.0.beta") == (
        "model.diffusion_model.out.0.bias"
    )


def test_names_in_a_safetensors_file_are_understood(tmp_path: Path):
    # MindSpore writes that format as well; its names tell.
    path = tmp_path / "x.safetensors"
    save_file(parameters(), path, metadata={"format": "ms"})
    assert set(open_native(path).tensors) == {*open_native(FILE).tensors}


def test_there_and_back_is_the_same(tmp_path: Path):
    native = open_native(FILE)
    back = convert(native, "mindspore")
    assert back.shapes == {name: tuple(t.shape) for name, t in parameters().items()}
    assert all(torch.equal(back.view(name), value) for name, value in parameters().items())


def test_a_tensor_under_two_names_is_refused(tmp_path: Path):
    norm = "model.diffusion_model.out.0"
    path = tmp_path / "x.safetensors"
    save_file({f"{norm}.gamma": torch.ones(32), f"{norm}.weight": torch.ones(32)}, path)
    with pytest.raises(ValueError, match="twice"):
        open_native(path)
