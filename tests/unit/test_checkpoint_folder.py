"""Folders of weights: written by diffusers itself, in every form in which it writes them."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sgm.checkpoint import load_checkpoint, open_checkpoint, open_native
from sgm.util import instantiate_from_config
from tests.foreign import folder_tensors, native_config, tiny_diffusers_pipeline

MAPS = Path("/proc/self/maps")
SECOND = "first_stage_model.encoder."  # made from the folder's one encoder, as the other is
UNUSED = "conditioner.embedders.3.encoder"


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return tiny_diffusers_pipeline(seed=1)


@pytest.fixture(scope="module")
def tensors(pipeline: Any) -> dict[str, torch.Tensor]:
    return folder_tensors(pipeline)


@pytest.fixture(scope="module")
def saved(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "pipeline"))


def engine() -> torch.nn.Module:
    with torch.device("meta"):
        return instantiate_from_config(native_config().model)


# --- forms of a folder ---

FORMS: dict[str, dict[str, Any]] = {
    "whole": {},
    "variant": {"variant": "fp16"},
    "shards": {"max_shard_size": "500KB"},
    "shards of a variant": {"max_shard_size": "500KB", "variant": "fp16"},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_written_values(
    pipeline: Any, tensors: dict[str, torch.Tensor], tmp_path: Path, form: str
):
    # Catches: a shard that is left out, a part under another's name, a variant not found.
    pipeline.save_pretrained(tmp_path / "folder", **FORMS[form])
    source = open_checkpoint(tmp_path / "folder")
    assert (len(source.files) > 3) == ("shards" in form)
    assert source.tensors.keys() == tensors.keys()
    assert all(torch.equal(source.view(key), value) for key, value in tensors.items())


def test_pickled_parts_are_read(folder: Path, tensors: dict[str, torch.Tensor]):
    # As folders were before safetensors: diffusion_pytorch_model.bin and pytorch_model.bin.
    for path in folder.rglob("*.safetensors"):
        torch.save(load_file(path), path.with_suffix(".bin"))
        path.unlink()
    source = open_checkpoint(folder)
    assert all(torch.equal(source.view(key), value) for key, value in tensors.items())


def test_the_smaller_variant_is_read_and_named(folder: Path, caplog: pytest.LogCaptureFixture):
    # Catches: the larger one; a pickle because it is smaller still; silence about the choice.
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    half = {key: value.half() for key, value in load_file(path).items()}
    save_file(half, path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    torch.save({"conv_in.bias": torch.ones(1)}, path.with_suffix(".bin"))
    with caplog.at_level(logging.INFO):
        source = open_checkpoint(folder)
    assert source.tensors["unet/conv_in.weight"].dtype == torch.float16
    assert source.tensors["vae/encoder.conv_in.weight"].dtype == torch.float32
    assert "diffusion_pytorch_model.fp16.safetensors is read" in caplog.text


def test_a_folder_with_one_file_is_that_file(tmp_path: Path):
    save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "README.md").write_text("a card")
    (tmp_path / ".half.safetensors").write_bytes(b"")
    assert set(open_checkpoint(tmp_path).tensors) == {"x"}


def test_a_pipeline_is_preferred_to_a_file_beside_it(folder: Path):
    # As in the published repositories, which hold the original file as well.
    save_file({"x": torch.ones(2)}, folder / "svd_xt.safetensors")
    assert "unet/conv_in.weight" in open_checkpoint(folder).tensors


# --- folders that are refused ---


def test_a_folder_without_weights_is_refused(tmp_path: Path, folder: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="a folder without weights: expected one file ending in"):
        open_checkpoint(tmp_path / "empty")
    for path in (folder / "vae").glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ValueError, match="vae is a folder without weights"):
        open_checkpoint(folder)


def test_several_files_are_refused_by_name(tmp_path: Path):
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"x": torch.ones(2)}, tmp_path / name)
    with pytest.raises(ValueError, match=r"several checkpoints: give one of a\.saf.*, b\.saf"):
        open_checkpoint(tmp_path)


def test_a_missing_shard_is_named(pipeline: Any, tmp_path: Path):
    pipeline.unet.save_pretrained(tmp_path / "unet", max_shard_size="500KB")
    *_, last = sorted((tmp_path / "unet").glob("*.safetensors"))
    last.unlink()
    with pytest.raises(ValueError, match=rf"{last.name} is missing: fetch it again"):
        open_checkpoint(tmp_path)


def test_the_files_of_two_sets_are_refused(pipeline: Any, tmp_path: Path):
    # Catches: tensors of an earlier download that silently stand in place of the later one's.
    pipeline.unet.save_pretrained(tmp_path / "unet", max_shard_size="5MB")
    pipeline.unet.save_pretrained(tmp_path / "other", max_shard_size="3MB")
    for path in (tmp_path / "other").glob("*.safetensors"):
        shutil.copy(path, tmp_path / "unet")
    with pytest.raises(ValueError, match=r"unet/\S+ holds unet/\S+ again"):
        open_checkpoint(tmp_path)


def test_the_index_is_not_believed(pipeline: Any, tmp_path: Path):
    # The names of the files tell what there is: an index could name any file of this machine.
    pipeline.unet.save_pretrained(tmp_path / "unet", max_shard_size="500KB")
    (index,) = (tmp_path / "unet").glob("*.index.json")
    index.write_text('{"weight_map": {"conv_in.weight": "../../secret.safetensors"}}')
    assert "unet/conv_in.weight" in open_checkpoint(tmp_path).tensors


def test_a_part_that_is_missing_is_named(folder: Path):
    shutil.rmtree(folder / "image_encoder")
    with pytest.raises(ValueError, match=r"missing \(image_encoder/") as caught:
        load_checkpoint(engine(), folder)
    assert str(folder) in str(caught.value)


def test_an_image_model_s_folder_is_called_so(folder: Path):
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    image = {k: v for k, v in load_file(path).items() if "temporal" not in k and "mixer" not in k}
    save_file(image, path)
    with pytest.raises(ValueError, match=r"missing .* It looks like a diffusers image U-Net"):
        load_checkpoint(engine(), folder)


# --- into a model ---


@pytest.mark.skipif(not MAPS.exists(), reason="needs Linux's list of memory mappings")
def test_a_folder_loads_without_copies(folder: Path, tensors: dict[str, torch.Tensor]):
    # Catches: a conversion that copies what is only renamed.
    model = engine()
    report = load_checkpoint(model, folder)
    assert report.fits
    mapped = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in MAPS.read_text().splitlines()
        if str(folder) in line
    ]
    copied = {
        name
        for name, parameter in model.named_parameters()
        if not any(low <= parameter.data_ptr() < high for low, high in mapped)
    }
    packed = {name for name in copied if ".in_proj_" in name}
    assert len(packed) == 2 * 2
    doubled = {name for name, _ in model.named_parameters() if name.startswith(SECOND)}
    assert copied - packed - doubled == {"conditioner.embedders.0.open_clip.model.visual.proj"}
    conv_in = model.get_parameter("model.diffusion_model.input_blocks.0.0.weight")
    assert torch.equal(conv_in, tensors["unet/conv_in.weight"])


def test_no_two_weights_share_memory(folder: Path):
    # Catches: training the first stage's encoder, which would change the condition's as well.
    model = engine()
    load_checkpoint(model, folder)
    first = model.get_parameter(f"{SECOND}conv_in.weight")
    other = model.get_parameter("conditioner.embedders.3.encoder.encoder.conv_in.weight")
    assert torch.equal(first, other)
    with torch.no_grad():
        first.zero_()
    assert other.any()


def test_what_nothing_uses_is_taken_out_of_the_model(folder: Path, tmp_path: Path):
    # Catches: values that no file holds (zeros, or memory as it was) in the state dict.
    model = engine()
    report = load_checkpoint(model, folder)
    assert report.absent == (f"{UNUSED}.decoder", f"{UNUSED}.post_quant_conv")
    state = model.state_dict()
    assert not [key for key in state if key.startswith(report.absent)]
    save_file(state, tmp_path / "native.safetensors")
    again = engine()
    assert load_checkpoint(again, tmp_path / "native.safetensors").absent == report.absent
    assert again.state_dict().keys() == state.keys()


@pytest.mark.parametrize("part", ["decoder", "post_quant_conv"])
def test_half_of_an_unused_part_is_an_error(folder: Path, tmp_path: Path, part: str):
    state = {k: torch.zeros(v.shape) for k, v in engine().state_dict().items()}
    key = max(key for key in state if key.startswith(f"{UNUSED}.{part}."))
    del state[key]
    save_file(state, tmp_path / "native.safetensors")
    with pytest.raises(ValueError, match=f"1 key missing .{key}"):
        load_checkpoint(engine(), tmp_path / "native.safetensors")


# --- one checkpoint over another ---


def test_a_unet_alone_goes_over_the_rest(folder: Path, tmp_path: Path):
    # Catches: the base's U-Net kept; the other parts lost. AnimateLCM's file is such a one.
    other = tiny_diffusers_pipeline(seed=2).unet.state_dict()
    save_file(other, tmp_path / "lcm.safetensors")
    model = engine()
    load_checkpoint(model, folder, overlay=tmp_path / "lcm.safetensors")
    conv_in = model.get_parameter("model.diffusion_model.input_blocks.0.0.weight")
    assert torch.equal(conv_in, other["conv_in.weight"])
    base = open_native(folder)
    key = "first_stage_model.decoder.conv_in.weight"
    assert torch.equal(model.get_parameter(key), base.view(key))


def test_an_overlay_of_another_model_is_refused(folder: Path, tmp_path: Path):
    save_file({"model.diffusion_model.extra.weight": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"does not go over .* no model\.diffusion_model\.extra"):
        load_checkpoint(engine(), folder, overlay=tmp_path / "x.safetensors")


def test_an_incomplete_unet_is_refused(folder: Path, tmp_path: Path):
    other = tiny_diffusers_pipeline(seed=2).unet.state_dict()
    del other["conv_out.bias"]
    save_file(other, tmp_path / "lcm.safetensors")
    with pytest.raises(ValueError, match=r"1 tensor missing \(unet/conv_out\.bias\)"):
        load_checkpoint(engine(), folder, overlay=tmp_path / "lcm.safetensors")
