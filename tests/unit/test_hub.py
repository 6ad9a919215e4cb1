"""The hub's files come to this machine, or one line says why not.

Against `tests.local_hub`, a server on this machine that speaks the hub's protocol; the client is
the real ``huggingface_hub``.
"""

import errno
import hashlib
import logging
import shutil
from collections import namedtuple

import pytest

from sgm.checkpoint.hub import choose_files, look_up
from sgm.checkpoint.hub_fetch import download, fetch
from sgm.checkpoint.room import in_bytes
from tests.local_hub import COMMIT, TOKEN, local_hub

REPOSITORY = "someone/some-video"
PIPELINE = {
    "model_index.json": b"{}",
    "unet/config.json": b"{}",
    "unet/diffusion_pytorch_model.safetensors": b"full" * 10,
    "unet/diffusion_pytorch_model.fp16.safetensors": b"half" * 5,
    "vae/diffusion_pytorch_model.fp16.safetensors": b"vae" * 5,
    "image_encoder/model.fp16.safetensors": b"clip" * 5,
    "some_video.safetensors": b"all in one" * 10,
}
CONTENT = bytes(range(256)) * 4096  # 1 MiB


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with local_hub(monkeypatch, tmp_path) as hub:
        hub.repositories[REPOSITORY] = PIPELINE
        yield hub


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (PIPELINE, [name for name in sorted(PIPELINE) if "fp16" in name]),
        (["a.safetensors", "README.md", "x/b.safetensors"], ["a.safetensors"]),
        (["a.ckpt", "unet/diffusion_pytorch_model.safetensors"], ["a.ckpt"]),  # no whole pipeline
        (
            [
                "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
                "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
                "unet/diffusion_pytorch_model.bin",
                "unet/diffusion_pytorch_model.non_ema.safetensors",
                "vae/diffusion_pytorch_model.bin",
                "image_encoder/model.safetensors",
                "feature_extractor/preprocessor_config.json",
            ],
            [
                "image_encoder/model.safetensors",
                "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
                "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
                "vae/diffusion_pytorch_model.bin",
            ],
        ),
    ],
)
def test_only_what_is_needed_is_chosen(files, chosen):
    """Catches: both variants, a pipeline's configs, the single file beside a pipeline."""
    assert sorted(choose_files("a/b", files)) == chosen


@pytest.mark.parametrize(
    ("files", "file", "words"),
    [
        (
            ["a.safetensors", "b.ckpt"],
            None,
            "several checkpoints: give one of o/n/a.safetensors",
        ),
        (["README.md"], None, "o/n holds no checkpoint"),
        (["a.ckpt"], "b.ckpt", "o/n has no file b.ckpt; its checkpoints: a.ckpt"),
    ],
)
def test_no_choice_is_an_error_that_lists_what_is_there(files, file, words):
    with pytest.raises(ValueError, match=words):
        choose_files("o/n", files, file)


def test_a_pipeline_comes_into_the_cache_and_stays_there(hub, caplog):
    """Catches: more than the half variant fetched, the licence not shown or shown too late, a
    second download, a cache that cannot be used without the network."""
    with caplog.at_level(logging.WARNING):
        folder = fetch(REPOSITORY)
    half = {name for name in PIPELINE if "fp16" in name}
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == half == hub.fetched()
    licence = f"some-community ({hub.url}/{REPOSITORY}/blob/main/LICENSE.md)"
    assert caplog.messages == [f"fetching 55 bytes of {REPOSITORY}; licence: {licence}"]

    hub.requests.clear()
    caplog.clear()
    assert fetch(REPOSITORY) == folder
    assert not hub.fetched()
    assert not caplog.messages


def test_nothing_is_drawn_where_there_is_no_terminal(hub, tmp_path, capfd):
    fetch(REPOSITORY)
    download(look_up(REPOSITORY), "some_video.safetensors", tmp_path / "a.safetensors")
    assert capfd.readouterr() == ("", "")


def test_one_file_of_a_repository(hub):
    path = fetch(REPOSITORY, "some_video.safetensors")
    assert path.name == "some_video.safetensors"
    assert path.read_bytes() == PIPELINE["some_video.safetensors"]
    assert hub.fetched() == {"some_video.safetensors"}


def test_without_the_network_the_cache_is_used(hub, monkeypatch, caplog):
    from huggingface_hub import constants

    folder = fetch(REPOSITORY)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with caplog.at_level(logging.WARNING):
        assert fetch(REPOSITORY) == folder
    assert "cannot be reached" in caplog.text
    with pytest.raises(
        ValueError, match=r"^http://127.0.0.1:9/o/n cannot be reached \(.*\): check"
    ):
        fetch("o/n")


def test_no_hub_and_nothing_cached_says_what_is_wrong(hub, monkeypatch):
    """Catches: the failure of the cache told in place of the network's."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"127.0.0.1:9/\S+ cannot be reached \(.*refused\)"):
        fetch(REPOSITORY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="not on this machine, and HF_HUB_OFFLINE forbids"):
        fetch(REPOSITORY)


@pytest.mark.parametrize("ask", [fetch, look_up])
def test_a_repository_that_is_not_there(hub, ask):
    with pytest.raises(
        ValueError, match=r"no repository http.*/no/such, or it is private"
    ) as error:
        ask("no/such")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("token", "more"), [(None, ""), ("hf_other", "; the account of")])
def test_a_gated_repository_says_which_page_and_which_token(hub, tmp_path, token, more):
    """Catches: a traceback, a page of another repository, an empty file left behind."""
    hub.gated.add(REPOSITORY)
    words = rf"is gated: accept its licence at {hub.url}/{REPOSITORY} .* HF_TOKEN{more}"
    with pytest.raises(ValueError, match=words) as error:
        fetch(REPOSITORY, token=token)
    assert "\n" not in str(error.value)
    about = look_up(REPOSITORY, token)
    with pytest.raises(ValueError, match=words):
        download(about, "some_video.safetensors", tmp_path / "out" / "a.safetensors", token)
    assert not list((tmp_path / "out").iterdir())


def test_the_token_opens_a_gated_repository(hub, tmp_path, monkeypatch):
    hub.gated.add(REPOSITORY)
    target = tmp_path / "a.safetensors"
    download(look_up(REPOSITORY), "some_video.safetensors", target, TOKEN)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert fetch(REPOSITORY).is_dir()
    elsewhere = {r.token for r in hub.requests if r.path.startswith("/cdn/")}
    assert elsewhere == {None}  # the hub's token is the hub's alone


def test_a_file_is_downloaded_once_and_checked(hub, tmp_path):
    target = tmp_path / "new" / "mine.safetensors"
    about = look_up(REPOSITORY)
    assert about.licence.startswith("some-community (")
    for _ in range(2):
        assert download(about, "some_video.safetensors", target) == target
    assert target.read_bytes() == PIPELINE["some_video.safetensors"]
    assert [path.name for path in target.parent.iterdir()] == ["mine.safetensors"]
    assert hub.ranges() == [None]


def test_another_file_in_its_place_is_kept(hub, tmp_path):
    target = tmp_path / "mine.safetensors"
    target.write_bytes(b"x" * len(PIPELINE["some_video.safetensors"]))
    with pytest.raises(ValueError, match=r"mine.safetensors is there and is not someone/.*move it"):
        download(look_up(REPOSITORY), "some_video.safetensors", target)
    assert target.read_bytes().startswith(b"xx")


def test_a_dropped_connection_is_taken_up_where_it_broke(hub, tmp_path, caplog):
    hub.repositories[REPOSITORY] = {"big.safetensors": CONTENT}
    hub.drop_after = len(CONTENT) // 2
    target = tmp_path / "big.safetensors"
    download(look_up(REPOSITORY), "big.safetensors", target)
    assert target.read_bytes() == CONTENT
    assert hub.ranges() == [None, f"bytes={len(CONTENT) // 2}-"]


def test_an_interrupted_download_goes_on_the_next_time(hub, tmp_path, monkeypatch):
    """Catches: a half file under the final name, a start from zero, a half of another version."""
    from huggingface_hub import file_download

    hub.repositories[REPOSITORY] = {"big.safetensors": CONTENT}
    hub.drop_after = len(CONTENT) // 2
    target = tmp_path / "big.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(file_download.time, "sleep", lambda _: setattr(hub, "status", 503))
        with pytest.raises(ValueError, match="the hub answers 503; try again later"):
            download(look_up(REPOSITORY), "big.safetensors", target)
    (part,) = tmp_path.glob(".*.part")
    assert part.stat().st_size == len(CONTENT) // 2
    assert not target.exists()
    hub.status = None
    hub.requests.clear()
    download(look_up(REPOSITORY), "big.safetensors", target)
    assert target.read_bytes() == CONTENT
    assert hub.ranges() == [f"bytes={len(CONTENT) // 2}-"]
    assert not part.exists()


def test_another_content_than_the_hub_says_is_thrown_away(hub, tmp_path):
    hub.lies["some_video.safetensors"] = "ab" * 32
    target = tmp_path / "a.safetensors"
    digest = hashlib.sha256(PIPELINE["some_video.safetensors"]).hexdigest()
    with pytest.raises(ValueError, match=rf"damaged, fetch it again: its sha256 is {digest}"):
        download(look_up(REPOSITORY), "some_video.safetensors", target)
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


def test_no_room_is_seen_before_anything_is_fetched(hub, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 90, 10))
    with pytest.raises(ValueError, match="has 10 bytes left, 55 bytes are needed"):
        fetch(REPOSITORY)
    about = look_up(REPOSITORY)
    with pytest.raises(ValueError, match="has 10 bytes left, 100 bytes are needed"):
        download(about, "some_video.safetensors", tmp_path / "a.safetensors")
    assert not hub.fetched()


def test_a_disk_that_fills_up_is_one_line(hub, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(
        ValueError, match="No space left on device; free some and run the same again"
    ):
        download(look_up(REPOSITORY), "some_video.safetensors", tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("size", "words"), [(12, "12 bytes"), (4_780_000_000, "4.78 GB"), (39_000_000, "39 MB")]
)
def test_sizes_in_words(size, words):
    assert in_bytes(size) == words


def test_the_state_that_was_looked_up_is_the_one_that_is_fetched(hub, tmp_path):
    """Catches: a file of a newer commit than the digest is of."""
    download(look_up(REPOSITORY), "some_video.safetensors", tmp_path / "a.safetensors")
    resolved = [r.path for r in hub.requests if "/resolve/" in r.path]
    assert all(f"/resolve/{COMMIT}/" in path for path in resolved)
    assert resolved
