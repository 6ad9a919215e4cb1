"""Prepared clips as training items: from files and from archives, with frames and with latents."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save

from sgm.data.clips import Clips
from sgm.data.index import Entry, Place, write_index
from sgm.data.mp4 import encode_mp4
from sgm.data.shards import write_shards
from sgm.training.draws import StepBatches
from tests.footage import pan, scene

SIZES = [(32, 48), (32, 48), (32, 48), (48, 32), (32, 48)]


def collection(root, latents=False):
    """Five clips of two shapes, each of its own grey level."""
    entries = []
    for number, (h, w) in enumerate(SIZES):
        frames = pan(scene(number), 0.02, 4, (h, w)) // 8 + 40 * number
        data = {"mp4": encode_mp4(frames.astype(np.uint8), 6 + number)}
        if latents:
            tensors = {"latents": torch.full((4, 2, 8, 8), float(number)).half()}
            tensors["cond_aug"] = torch.arange(3.0) + number
            data["latents.safetensors"] = save(tensors)
        places = {}
        for suffix, content in data.items():
            (root / f"{number}.{suffix}").write_bytes(content)
            places[suffix] = Place(f"{number}.{suffix}", len(content))
        facts = (f"k{number}", f"video {number}.mkv", 1.5, 6.0 + number, 4, h, w, 0.01)
        entries.append(Entry(*facts, 50 + number, number == 3, places))
    write_index(root, entries)
    (root / "meta.json").write_text(json.dumps({"latents": None}))
    return entries


def test_an_item_is_the_clip_of_its_number(tmp_path):
    collection(tmp_path)
    clips = Clips(tmp_path)
    assert len(clips) == 5
    for number in (4, 0, 2):
        item = clips[number]
        assert item["frames"].shape == (4, 3, *SIZES[number])
        assert item["frames"].dtype == torch.float32
        level = (item["frames"].mean() + 1) * 127.5
        assert 40 * number <= level < 40 * (number + 1)
        numbers = {k: int(item[k]) for k in ("fps_id", "motion_bucket_id", "index")}
        assert numbers == {
            "fps_id": 5 + number,
            "motion_bucket_id": 50 + number,
            "index": number,
        }
    assert clips.describe(2) == "k2 (video 2.mkv at 1.50 s)"


def test_items_of_several_collections_follow_each_other(tmp_path):
    """Catches: an item that is looked for in another collection."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        collection(tmp_path / name)
    (tmp_path / "a" / "2.mp4").unlink()
    both, alone = Clips([tmp_path / "a", tmp_path / "b"]), Clips(str(tmp_path / "b"))
    assert len(both) == 2 * len(alone) == 10
    assert both[7]["frames"].equal(alone[2]["frames"])
    with pytest.raises(ValueError, match="k2"):
        both[2]


def test_archives_give_the_same_items_as_files(tmp_path):
    entries = collection(tmp_path, latents=True)
    packed = tmp_path / "packed"
    packed.mkdir()
    for file in tmp_path.glob("*.*"):
        (packed / file.name).write_bytes(file.read_bytes())
    write_index(packed, list(write_shards(entries, packed, limit=20_000)))
    for latents in (False, True):
        files, archives = Clips(tmp_path, latents), Clips(packed, latents)
        for number in range(5):
            for key, value in files[number].items():
                assert torch.equal(value, archives[number][key]), key


def test_latents_are_given_where_they_are(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    collection(tmp_path / "a")
    collection(tmp_path / "b", latents=True)
    item = Clips(tmp_path / "b")[2]
    assert "frames" not in item
    assert item["latents"].dtype == torch.float32
    assert (item["latents"] == 2).all()
    assert item["cond_aug"].tolist() == [2, 3, 4]
    assert "frames" in Clips(tmp_path / "b", latents=False)[2]
    assert "frames" in Clips(tmp_path / "a")[2]
    with pytest.raises(ValueError, match="prepare it with --latents"):
        Clips(tmp_path / "a", latents=True)


def test_splits_share_nothing(tmp_path):
    collection(tmp_path)
    kept, rest = Clips(tmp_path, split="heldout"), Clips(tmp_path, split="train")
    assert [entry.key for entry in kept.entries] == ["k3"]
    assert [entry.key for entry in rest.entries] == ["k0", "k1", "k2", "k4"]
    with pytest.raises(ValueError, match="train or heldout"):
        Clips(tmp_path, split="test")
    with pytest.raises(ValueError, match="root: expected a folder of prepared clips"):
        Clips([])
    entries = [replace(e, heldout=False) for e in Clips(tmp_path).entries]
    write_index(tmp_path, entries)
    with pytest.raises(ValueError, match="none of its 5 clips"):
        Clips(tmp_path, split="heldout")


def test_a_damaged_clip_is_named(tmp_path):
    collection(tmp_path, latents=True)
    for name in ("1.mp4", "1.latents.safetensors"):
        size = (tmp_path / name).stat().st_size
        (tmp_path / name).write_bytes(b"x" * size)
    for latents in (False, True):
        with pytest.raises(ValueError, match=r"k1 \(video 1\.mkv at 1\.50 s\): .*(decode|damaged)"):
            Clips(tmp_path, latents)[1]


def test_batches_are_of_one_shape_and_take_every_clip_alike(tmp_path):
    # Catches groups drawn evenly, which would repeat the clips of a rare size.
    collection(tmp_path)
    groups = Clips(tmp_path).groups
    assert [sorted(group) for group in groups] == [[0, 1, 2, 4], [3]]
    batch = 2
    feed = iter(StepBatches(5, batch, seed=1, groups=groups))
    seen = np.zeros(5, int)
    for _ in range(3 * 5):  # in 5 steps of 2, each item comes twice
        items = next(feed)
        assert {SIZES[i] for i in items} == {SIZES[items[0]]}
        seen += np.bincount(items, minlength=5)
    assert seen.tolist() == [6] * 5


def test_groups_continue_and_are_shared_out_like_single_ones():
    groups = [[0, 2, 4, 6, 7], [1, 3], [5]]
    whole = iter(StepBatches(8, 4, seed=2, groups=groups))
    halves = [iter(StepBatches(8, 2, 2, rank=r, world=2, groups=groups)) for r in (0, 1)]
    steps = [next(whole) for _ in range(20)]
    assert [next(halves[0]) + next(halves[1]) for _ in range(20)] == steps
    for step in (1, 7, 13):
        assert next(iter(StepBatches(8, 4, 2, step=step, groups=groups))) == steps[step]
    assert steps[:8] != steps[8:16]


def test_one_group_is_as_no_groups():
    plain, one = (iter(StepBatches(7, 3, 5, groups=g)) for g in (None, [range(7)]))
    assert [next(plain) for _ in range(9)] == [next(one) for _ in range(9)]


def test_groups_that_leave_items_out_are_refused():
    for groups in ([[0, 1]], [[0, 1, 2], [2]]):
        with pytest.raises(ValueError, match="each of 3 items in one"):
            StepBatches(3, 1, 0, groups=groups)
