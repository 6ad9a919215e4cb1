"""Writing checkpoints: streamed, verified, all or nothing."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sgm.checkpoint import known_sha256, open_checkpoint, sha256_of
from sgm.checkpoint import writing as module
from sgm.checkpoint.source import Source
from sgm.checkpoint.writing import write_file, write_folder

STATUS = Path("/proc/self/status")


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SGM_CACHE", str(tmp_path_factory.mktemp("cache")))


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(3, 5, generator=generator),
        "a.scale": torch.tensor(0.25),
        "empty": torch.zeros(0, 4),
        "steps": torch.tensor([7, 2**40 + 1]),
    }


def source(folder: Path, content: dict[str, Tensor] | None = None) -> Source:
    path = folder / "source.safetensors"
    save_file(tensors() if content is None else content, path, metadata={"title": "Åse"})
    return open_checkpoint(path)


def folder_source(folder: Path) -> Source:
    content = {
        "unet/conv_in.weight": torch.ones(2),
        "vae/encoder.conv_norm_out.weight": torch.ones(3),
        "image_encoder/visual_projection.weight": torch.ones(4),
    }
    return source(folder, content)


def only(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_values_types_and_metadata_arrive(tmp_path: Path, dtype: torch.dtype | None):
    # Catches: converted integers, a scalar or empty tensor lost, a header out of step.
    path = tmp_path / "out.safetensors"
    write_file(source(tmp_path), path, dtype)
    found = load_file(path)  # by safetensors' own reader
    for name, value in tensors().items():
        wanted = value.to(dtype) if dtype and value.is_floating_point() else value
        assert found[name].dtype == wanted.dtype
        assert torch.equal(found[name], wanted)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "title": "Åse"}


def test_the_digest_is_right_and_remembered(tmp_path: Path):
    (written,) = write_file(source(tmp_path), tmp_path / "out.safetensors")
    assert written.size == written.path.stat().st_size
    assert known_sha256(written.path) == written.sha256
    os.utime(written.path)  # another state of the file: computed anew
    assert known_sha256(written.path) is None
    assert sha256_of(written.path) == written.sha256


def test_a_folder_has_its_parts_and_texts(tmp_path: Path):
    opened, out = folder_source(tmp_path), tmp_path / "out"
    texts = {"model_index.json": "{}", "unet/config.json": "[1]"}
    write_folder(opened, out, texts)
    assert load_file(out / "unet/diffusion_pytorch_model.safetensors").keys() == {"conv_in.weight"}
    assert (out / "unet/config.json").read_text() == "[1]"
    assert open_checkpoint(out).shapes == opened.shapes
    with pytest.raises(ValueError, match="is there already"):
        write_folder(opened, out, texts)
    write_folder(opened, out, {"model_index.json": "{}"}, force=True)
    assert not (out / "unet/config.json").exists()


def test_no_other_folder_is_replaced(tmp_path: Path):
    # Catches: --force that deletes a user's pictures.
    (tmp_path / "home").mkdir()
    (tmp_path / "home/letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="not the folder of a diffusers pipeline"):
        write_folder(source(tmp_path), tmp_path / "home", {}, force=True)
    assert (tmp_path / "home/letter.txt").read_text() == "dear"


def test_nothing_is_overwritten_unasked(tmp_path: Path):
    path = tmp_path / "out.safetensors"
    path.write_text("precious")
    with pytest.raises(ValueError, match="is there already"):
        write_file(source(tmp_path), path)
    assert path.read_text() == "precious"
    write_file(source(tmp_path), path, force=True)
    assert load_file(path).keys() == tensors().keys()


def test_the_source_is_never_the_target(tmp_path: Path):
    opened = source(tmp_path)
    (tmp_path / "link.safetensors").symlink_to(opened.path)
    for name in ("source.safetensors", "link.safetensors"):
        with pytest.raises(ValueError, match="is the source itself"):
            write_file(opened, tmp_path / name, force=True)
    assert load_file(opened.path).keys() == tensors().keys()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, bad: float):
    opened = source(tmp_path, tensors() | {"b.weight": torch.tensor([1.0, bad])})
    with pytest.raises(ValueError, match=r"b\.weight has values that are not finite"):
        write_file(opened, tmp_path / "out.safetensors")
    assert only(tmp_path) == {"source.safetensors"}


def test_values_too_large_for_the_type_are_refused(tmp_path: Path):
    opened = source(tmp_path, {"b.weight": torch.tensor([1.0, -1e5])})
    with pytest.raises(ValueError, match=r"b\.weight reaches 1e\+05, too large for torch.float16"):
        write_file(opened, tmp_path / "out.safetensors", torch.float16)
    write_file(opened, tmp_path / "out.safetensors", torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (torch.int8, "quantised"),
        (torch.uint8, "quantised"),
        (torch.float8_e4m3fn, "quantised"),
        (torch.float64, "say --dtype"),
    ],
)
def test_unsuitable_types_are_refused(tmp_path: Path, dtype: torch.dtype, message: str):
    opened = source(tmp_path, {"b.weight": torch.ones(2).to(dtype)})
    with pytest.raises(ValueError, match=message):
        write_file(opened, tmp_path / "out.safetensors")
    assert only(tmp_path) == {"source.safetensors"}


def test_double_precision_is_converted_when_asked(tmp_path: Path):
    opened = source(tmp_path, {"b.weight": torch.ones(2).double()})
    write_file(opened, tmp_path / "out.safetensors", torch.float32)
    assert load_file(tmp_path / "out.safetensors")["b.weight"].dtype == torch.float32


# --- what goes wrong on the way ---


class Broken(BaseException):
    """Stands for Ctrl-C and whatever else ends a run."""


@pytest.mark.parametrize("stage", ["writing", "verifying"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), Broken(), OSError(errno.ENOSPC, "full")])
def test_an_interrupted_run_leaves_nothing(tmp_path: Path, stage: str, error: BaseException):
    # Catches: a half-written file under the final name, or a temporary one that stays.
    (tmp_path / "out").mkdir()

    def interrupt(now: str, done: int, total: int) -> None:
        if now == stage:
            raise error

    expected = ValueError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        write_file(source(tmp_path), tmp_path / "out/x.safetensors", progress=interrupt)
    assert only(tmp_path / "out") == set()
    with pytest.raises(expected):
        write_folder(folder_source(tmp_path), tmp_path / "out/x", {"a": "b"}, progress=interrupt)
    assert only(tmp_path / "out") == set()


def test_a_source_cut_short_meanwhile_is_one_error(tmp_path: Path):
    # Catches: reading through the mapping, where this would end the process (SIGBUS).
    opened = source(tmp_path, {name: torch.zeros(50_000) for name in "abc"})

    def cut(*_: object) -> None:
        os.truncate(opened.path, 1000)

    with pytest.raises(ValueError, match="became shorter while it was being read"):
        write_file(opened, tmp_path / "out.safetensors", progress=cut)
    assert only(tmp_path) == {"source.safetensors"}


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_source_written_to_meanwhile_is_an_error(tmp_path: Path, suffix: str):
    path = tmp_path / f"source{suffix}"
    content = {name: torch.zeros(10) for name in "ab"}
    (save_file if suffix == ".safetensors" else torch.save)(content, path)
    opened = open_checkpoint(path)

    def change(*_: object) -> None:
        with path.open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"\1\1\1\1")
        os.utime(path, (1, 1))

    with pytest.raises(ValueError, match="while it was being read; try again"):
        write_file(opened, tmp_path / "out.safetensors", progress=change)
    assert only(tmp_path) == {path.name}


def test_a_source_replaced_by_another_file_is_read_to_its_end(tmp_path: Path):
    opened = source(tmp_path, {name: torch.ones(10) for name in "ab"})
    save_file({name: torch.zeros(10) for name in "ab"}, tmp_path / "new.safetensors")

    def replace(*_: object) -> None:
        if (tmp_path / "new.safetensors").exists():
            (tmp_path / "new.safetensors").replace(opened.path)

    write_file(opened, tmp_path / "out.safetensors", progress=replace)
    assert all(tensor.eq(1).all() for tensor in load_file(tmp_path / "out.safetensors").values())


def test_a_disk_that_stores_something_else_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Catches: a verification that trusts what was written.
    def damage(path: Path, *args: object) -> str:
        digest = write(path, *args)
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\xff")
        return digest

    write = module._write_one
    monkeypatch.setattr(module, "_write_one", damage)
    with pytest.raises(ValueError, match="does not hold what was written to it"):
        write_file(source(tmp_path), tmp_path / "out.safetensors")
    assert only(tmp_path) == {"source.safetensors"}


def test_a_full_disk_is_noticed_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_SLACK", 1 << 60)
    with pytest.raises(ValueError, match=r" left, .* are needed"):
        write_file(source(tmp_path), tmp_path / "new" / "folder" / "out.safetensors")
    assert only(tmp_path) == {"source.safetensors"}


def test_what_appears_meanwhile_is_kept(tmp_path: Path):
    # Catches: --force looked at before the minutes of writing alone.
    target = tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match="is there already"):
        write_file(source(tmp_path), target, progress=lambda *_: target.write_text("precious"))
    assert target.read_text() == "precious"
    assert only(tmp_path) == {"source.safetensors", "out.safetensors"}


def test_a_name_that_cannot_be_is_one_line(tmp_path: Path):
    for target in (
        tmp_path / ("x" * 300 + ".safetensors"),
        tmp_path / ("x" * 245 + ".safetensors"),
    ):
        with pytest.raises(ValueError, match="cannot be written: File name too long"):
            write_file(source(tmp_path), target)


@pytest.mark.skipif(os.name != "posix", reason="makes a symbolic link")
def test_a_link_to_itself_is_replaced(tmp_path: Path):
    target = tmp_path / "out.safetensors"
    target.symlink_to(target.name)
    write_file(source(tmp_path), target)
    assert target.is_file()


def test_a_torch_file_that_is_taken_away_is_called_by_its_name(tmp_path: Path):
    # Catches: the target said to be at fault.
    path = tmp_path / "source.ckpt"
    torch.save({"x": torch.ones(2)}, path)
    opened = open_checkpoint(path)
    path.unlink()
    with pytest.raises(ValueError, match=r"source\.ckpt was replaced while it was being read"):
        write_file(opened, tmp_path / "out.safetensors")


@pytest.mark.skipif(not STATUS.exists(), reason="reads Linux's account of memory")
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_little_memory_is_used(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch):
    # Catches: tensors that are kept, and pages of the mapping that count until the end.
    monkeypatch.setattr("sgm.checkpoint.torch_file._KEPT", 8 << 20)
    block = torch.zeros(1 << 20)  # 4 MiB
    path = tmp_path / f"source{suffix}"
    content = {f"{number}": block.clone() for number in range(32)}
    (save_file if suffix == ".safetensors" else torch.save)(content, path)
    del content

    def resident(*_: object) -> int:
        return int(STATUS.read_text().partition("VmRSS:")[2].split()[0]) // 1024  # MiB

    opened, peaks = open_checkpoint(path), []
    before = resident()
    write_file(opened, tmp_path / "out.safetensors", progress=lambda *_: peaks.append(resident()))
    assert max(peaks) - before < 48  # of 128
