"""What ``--ckpt_path`` and ``--version`` mean: a place, and the model that is there."""

import logging
import time
from pathlib import Path

import pytest

from sgm.checkpoint.reading import SUFFIXES
from sgm.inference import weights
from sgm.inference.settings import find_model
from sgm.inference.specs import SPECS
from sgm.inference.weights import given_weights, locate, parse_address, tell_model
from tests.sparse import published_shapes, write_sparse

SVD = ("svd_xt", "svd", "svd_xt_1_1", "svd_xt_lcm")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("stabilityai/sv3d", ("stabilityai/sv3d", None)),
        ("stabilityai/sv3d/sv3d_u.safetensors", ("stabilityai/sv3d", "sv3d_u.safetensors")),
        ("hf://a/b", ("a/b", None)),
        ("hf://a/b.ckpt", ("a/b.ckpt", None)),
        ("hf://a/b/unet/x.safetensors", ("a/b", "unet/x.safetensors")),
        ("https://huggingface.co/a/b", ("a/b", None)),
        ("https://huggingface.co/a/b/tree/main", ("a/b", None)),
        ("https://huggingface.co/a/b/blob/main/x.ckpt", ("a/b", "x.ckpt")),
        ("https://huggingface.co/a/b/resolve/main/u/x.ckpt", ("a/b", "u/x.ckpt")),
        ("svd_xt.safetensors", None),
        ("weights/svd_xt.safetensors", None),  # a missing file, not a repository
        ("here/something", None),  # a missing folder in one that is here
        ("./a/b", None),
        ("/a/b", None),
        ("~/a", None),
        ("a/b/c", None),
        ("a", None),
        ("", None),
    ],
)
def test_places_on_the_hub_and_on_this_machine(tmp_path, monkeypatch, text, place):
    """Catches: a misspelt path that goes out to the network as the name of a repository."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse_address(text) == place


@pytest.mark.parametrize("text", ["hf://", "hf://a", "https://huggingface.co/a", "hf://../b"])
def test_an_address_of_the_hub_without_a_repository_is_refused(text):
    with pytest.raises(ValueError, match=r"^expected hf://OWNER/NAME or hf://OWNER/NAME/FILE, got"):
        parse_address(text)


def test_what_is_here_comes_before_the_hub(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate("owner/name") == Path.cwd() / "owner" / "name"
    assert locate("absent.safetensors") is None


@pytest.mark.parametrize(
    ("keys", "name", "model"),
    [
        ("svd", "svd_xt.safetensors", "svd_xt"),
        ("svd", "svd.safetensors", "svd"),
        ("svd", "svd_xt_1_1.safetensors", "svd_xt_1_1"),
        ("svd", "SVD-XT-1.1-fp16.safetensors", "svd_xt_1_1"),
        ("svd", "svd_xt_lcm.safetensors", "svd_xt_lcm"),
        ("svd", "my_svd_xt_finetune.safetensors", "svd_xt"),
        ("svd", "svd_xtra.safetensors", "svd"),  # whole words count
        ("svd", "xsvd_xt-svd.safetensors", "svd"),
        ("svd", "stable-video-diffusion-img2vid/model.safetensors", "svd"),
        ("svd", "stable-video-diffusion-img2vid-xt-1-1/model.safetensors", "svd_xt_1_1"),
        (
            "svd",
            "models--x--stable-video-diffusion-img2vid-xt/0a/x.safetensors",
            "svd_xt",
        ),
        ("svd_image_decoder", "svd_xt.safetensors", "svd_xt_image_decoder"),
        ("svd_image_decoder", "svd_image_decoder.safetensors", "svd_image_decoder"),
        ("sv3d_p", "svd.safetensors", "sv3d_p"),  # the keys come before the name
        ("sv3d_u", "anything.safetensors", "sv3d_u"),
    ],
)
def test_the_keys_tell_the_model_and_then_the_name(tmp_path, caplog, keys, name, model):
    """Catches: svd for each name that contains it, a name believed against the keys."""
    path = write_sparse(tmp_path / name, published_shapes(keys))
    with caplog.at_level(logging.INFO, "sgm.inference"):
        assert tell_model(path).name == model
    how = "keys" if keys.startswith("sv3d") else "name"
    assert caplog.messages == [f"{path.name} is {model}, by its {how}"]


def test_a_folder_is_told_by_its_own_name_or_by_its_file(tmp_path):
    shapes = published_shapes("svd")
    write_sparse(tmp_path / "svd_xt_1_1" / "model.safetensors", shapes)
    write_sparse(tmp_path / "downloads" / "svd.safetensors", shapes)
    assert tell_model(tmp_path / "svd_xt_1_1").name == "svd_xt_1_1"
    assert tell_model(tmp_path / "downloads").name == "svd"


def test_a_name_that_tells_nothing_is_an_error_with_the_candidates(tmp_path):
    path = write_sparse(tmp_path / "model.safetensors", published_shapes("svd"))
    words = rf"model.safetensors may be {', '.join(SVD)}, .* say which with --version"
    with pytest.raises(ValueError, match=words):
        tell_model(path)


def test_another_model_is_named(tmp_path):
    shapes = {"model.diffusion_model.input_blocks.1.1.attn2.to_k.weight": (320, 768)}
    path = write_sparse(tmp_path / "v1-5.safetensors", shapes | {"first_stage_model.x": (1,)})
    with pytest.raises(ValueError, match=r"v1-5.safetensors .* like Stable Diffusion 1"):
        tell_model(path)


def test_the_row_of_the_model_that_was_told_gives_the_defaults(tmp_path):
    path = write_sparse(tmp_path / "svd.safetensors", published_shapes("svd"))
    files = find_model(ckpt_path=path)
    assert (files.spec, files.config_path.name, files.checkpoint) == (
        SPECS["svd"],
        "svd.yaml",
        path,
    )
    assert files.weight_files() == (path,)


def test_the_given_version_is_not_doubted_before_loading(tmp_path):
    path = write_sparse(tmp_path / "svd.safetensors", published_shapes("svd"))
    assert find_model("svd_xt", ckpt_path=path).spec is SPECS["svd_xt"]


def test_a_missing_file_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint 'none\.ckpt': no such file or folder"):
        find_model("svd", ckpt_path="none.ckpt")
    with pytest.raises(ValueError, match=r"svd needs its weights at .*download.py svd"):
        find_model("svd")


def test_the_formats_that_are_read_are_those_that_are_looked_for():
    assert weights._SUFFIXES == SUFFIXES


@pytest.mark.parametrize(
    ("asked", "words"),
    [("x" * 300 + ".ckpt", "File name too long"), ("~nosuchuser/x.ckpt", "no home folder ~nosuch")],
    ids=["too long", "no such user"],
)
def test_what_can_be_no_file_is_one_line(asked, words):
    with pytest.raises(ValueError, match=rf"{asked[:9]}.*{words}"):
        given_weights(asked)
    with pytest.raises(ValueError, match=rf"{asked[:9]}.*{words}"):
        find_model("svd", config=asked.replace(".ckpt", ".yaml"))


@pytest.mark.parametrize("name", ["svd_xt.safetensors", "svd_xt.ckpt", "svd_xt/unet/x.safetensors"])
def test_weights_are_found_under_the_name_of_the_model(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoints" / name
    path.parent.mkdir(parents=True)
    path.touch()
    expected = path.parent.parent if "unet" in name else path
    assert SPECS["svd_xt"].checkpoint == expected
    assert find_model("svd_xt").checkpoint == expected


def test_telling_reads_headers_alone(tmp_path):
    """A file of 4.8 GB, in the time that its header takes. Catches: weights that are read."""
    path = write_sparse(tmp_path / "svd_xt.safetensors", published_shapes("svd"))
    assert path.stat().st_size > 4e9
    began = time.process_time()
    tell_model(path)
    assert time.process_time() - began < 2
