"""The list of photographs, and the script that packs them."""

import json
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from scripts import prepare_photos

ROOT = Path(__file__).parents[2]
FREE = {"Public domain", "CC0-1.0", "GPL-2+", "LGPL-3", "MIT", "BSD-3-Clause"} | {
    f"CC-BY{share}-{version}" for share in ("", "-SA") for version in ("2.0", "3.0", "4.0")
}


def test_the_list_is_complete_and_free():
    photos = json.loads((ROOT / "configs/data/photos.json").read_text())
    assert len({photo["name"] for photo in photos}) == len(photos)
    assert len({(photo["package"], photo["path"]) for photo in photos}) == len(photos)
    assert {photo["licence"] for photo in photos} <= FREE
    assert all(photo["author"] for photo in photos)
    splits = [photo["split"] for photo in photos]
    assert set(splits) == set(prepare_photos.SPLITS)
    assert splits.count("heldout") == splits.count("test") == 16


def test_no_package_of_the_test_photographs_ships_another_split():
    # One collection often shows one scene several times: a test photograph shares none.
    photos = json.loads((ROOT / "configs/data/photos.json").read_text())
    packages = {split: set() for split in prepare_photos.SPLITS}
    for photo in photos:
        packages[photo["split"]].add(photo["package"])
    assert not packages["test"] & (packages["train"] | packages["heldout"])


def test_the_readme_counts_the_list():
    # Its tables: split, photographs, ...; and package, version, split or splits, photographs.
    text = (ROOT / "configs/data/README.md").read_text()
    photos = json.loads((ROOT / "configs/data/photos.json").read_text())
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    packages = {row[0]: int(row[3]) for row in rows if len(row) == 4 and row[3].isdigit()}
    splits = {row[0]: int(row[1]) for row in rows if len(row) == 3 and row[1].isdigit()}
    assert packages == Counter(photo["package"] for photo in photos)
    assert splits == Counter(photo["split"] for photo in photos)
    commands = text[text.index("```sh") :]
    assert all(package in commands for package in packages)


def test_the_sample_picture_is_small_and_heldout():
    sample = ROOT / "assets" / "sample.jpg"
    assert sample.stat().st_size < 150_000
    with Image.open(sample) as picture:
        assert max(picture.size) <= 768
    photos = json.loads((ROOT / "configs/data/photos.json").read_text())
    (panda,) = [photo for photo in photos if photo["name"] == "red_panda"]
    assert (panda["split"], panda["licence"]) == ("heldout", "CC0-1.0")
    assert panda["author"] in (ROOT / "assets" / "README.md").read_text()


def resource(members, version):
    """Write a Qt resource file: the root, a folder "pictures" and the (name, bytes, deflate)s."""
    names, data, nodes = b"", b"", []
    node = ">IHII" if version == 1 else ">IHIIQ"
    time = () if version == 1 else (0,)

    def add_name(name):
        nonlocal names
        start = len(names)
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
        return start

    nodes.append(struct.pack(node, 0, 2, 1, 1, *time))
    nodes.append(struct.pack(node, add_name("pictures"), 2, len(members), 2, *time))
    for name, content, deflate in members:
        packed = struct.pack(">I", len(content)) + zlib.compress(content) if deflate else content
        nodes.append(struct.pack(node, add_name(name), int(deflate), 0, len(data), *time))
        data += struct.pack(">I", len(packed)) + packed
    tree = b"".join(nodes)
    head = 24
    places = (head, head + len(tree), head + len(tree) + len(data))
    return b"qres" + struct.pack(">5I", version, *places, 0) + tree + data + names


@pytest.mark.parametrize("version", [1, 3])
def test_members_of_a_resource_file(tmp_path, version):
    path = tmp_path / f"v{version}.rcc"
    path.write_bytes(
        resource([("ä.webp", b"plain", False), ("b.svg", b"deflated" * 9, True)], version)
    )
    expected = {"/pictures/ä.webp": b"plain", "/pictures/b.svg": b"deflated" * 9}
    assert prepare_photos.read_resources(path) == expected
    (tmp_path / "other.rcc").write_bytes(b"something else")
    with pytest.raises(ValueError, match="not a Qt resource"):
        prepare_photos.read_resources(tmp_path / "other.rcc")


def test_photographs_are_packed_by_split(tmp_path, monkeypatch, capsys):
    # A picture of two halves keeps its proportions, channels and sides; a missing one is named.
    pixels = np.zeros((400, 600, 3), np.uint8)
    pixels[:, :300, 0], pixels[:, 300:, 2] = 255, 255
    (tmp_path / "some").mkdir()
    Image.fromarray(pixels).save(tmp_path / "some" / "wide.png")
    webp = tmp_path / "tall.webp"
    Image.fromarray(pixels.transpose(1, 0, 2)).convert("L").save(webp, lossless=True)
    (tmp_path / "some" / "x.rcc").write_bytes(resource([("t.webp", webp.read_bytes(), False)], 1))
    entries = [
        {"name": "wide", "package": "some", "path": "wide.png", "split": "train"},
        {"name": "tall", "package": "some", "path": "x.rcc!/pictures/t.webp", "split": "heldout"},
        {"name": "lost", "package": "other", "path": "lost.png", "split": "train"},
        {"name": "gone", "package": "some", "path": "x.rcc!/pictures/no.webp", "split": "train"},
        {"name": "odd", "package": "some", "path": "wide.png!/member", "split": "train"},
        {"name": "blind", "package": "some", "path": "wide.png", "split": "test"},
    ]
    photo_list = tmp_path / "list.json"
    photo_list.write_text(json.dumps(entries))
    argv = ["prepare_photos", str(tmp_path), str(tmp_path / "out"), "--list", str(photo_list)]
    monkeypatch.setattr("sys.argv", [*argv, "--short-side", "40"])
    assert prepare_photos.main() == 1
    printed = capsys.readouterr().out
    assert "missing: lost" in printed
    assert "missing: gone" in printed
    assert "missing: odd (some)" in printed
    train = load_file(tmp_path / "out" / "train.safetensors")
    assert list(train) == ["wide"]
    assert train["wide"].shape == (3, 40, 60)
    assert train["wide"][:, 20, 5].tolist() == [255, 0, 0]
    assert train["wide"][:, 20, 55].tolist() == [0, 0, 255]
    heldout = load_file(tmp_path / "out" / "heldout.safetensors")
    assert heldout["tall"].shape == (3, 60, 40)
    assert list(load_file(tmp_path / "out" / "test.safetensors")) == ["blind"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--short-side", "0"], "positive number of pixels"), ([], "no folder of unpacked packages")],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    tmp_path, monkeypatch, capsys, arguments, message
):
    source = tmp_path if arguments else tmp_path / "nowhere"
    argv = ["prepare_photos", str(source), str(tmp_path / "out"), *arguments]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit, match="2"):
        prepare_photos.main()
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
