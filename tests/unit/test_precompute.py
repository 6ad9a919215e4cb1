"""Latents computed beforehand against the engine's own encoders, for the bundled model."""

import json

import pytest
import torch

from sgm.data.clips import Clips
from sgm.data.index import Entry, Place, write_index
from sgm.data.mp4 import encode_mp4
from sgm.inference.specs import ROOT
from sgm.training.precompute import Encoders, precompute
from tests.footage import pan, scene

CHECKPOINT = ROOT / "checkpoints" / "svd_tiny.safetensors"


@pytest.fixture(scope="module")
def encoders():
    return Encoders(CHECKPOINT, torch.device("cpu"), draws=2)


@pytest.fixture
def collection(tmp_path):
    entries = []
    for number in range(2):
        data = encode_mp4(pan(scene(number), 0.01, 3, (64, 64)), 7)
        (tmp_path / f"{number}.mp4").write_bytes(data)
        place = {"mp4": Place(f"{number}.mp4", len(data))}
        entries.append(Entry(f"k{number}", "v", 0.0, 7.0, 3, 64, 64, 0.01, 9, False, place))
    write_index(tmp_path, entries)
    (tmp_path / "meta.json").write_text(json.dumps({}))
    return tmp_path, entries


def test_they_are_what_the_engine_would_compute(encoders, collection):
    # Catches a scale on the condition latents, one missing on the video's, noise that is not of the
    # stated level, and CLIP on the noisy frame.
    root, entries = collection
    write_index(root, list(precompute(encoders, root, entries)))
    frames = Clips(root, latents=False)[1]["frames"]
    item = Clips(root)[1]
    engine = encoders.engine
    with torch.no_grad():
        moments = engine.first_stage_model.moments(frames)
        expected = engine.scale_factor * moments.chunk(2, dim=1)[0]
        clip = engine.conditioner.embedders[0](frames[:1])[0, 0]
        clean = engine.conditioner.embedders[3](frames[:1])
    torch.testing.assert_close(item["latents"], expected, rtol=1e-3, atol=2e-3)  # half precision
    torch.testing.assert_close(item["image_embedding"], clip)
    assert item["cond_latents"].shape == (2, *clean.shape[1:])
    assert item["cond_aug"].shape == (2,)
    off = (item["cond_latents"] - clean).square().mean(dim=(1, 2, 3)).sqrt()
    louder = item["cond_aug"].argmax()
    assert off.argmax() == louder
    assert 0 < off.min() < off.max() < 1
    assert (item["cond_aug"].log() + 3).abs().max() < 2  # ln s of N(-3, 0.5^2)


def test_the_noise_is_a_function_of_seed_and_name(encoders, collection):
    frames = torch.zeros(2, 3, 64, 64)
    first, again = encoders.encode(frames, "a"), encoders.encode(frames, "a")
    other = encoders.encode(frames, "b")
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["cond_aug"], other["cond_aug"])
    assert torch.equal(first["latents"], other["latents"])


def test_what_is_there_is_kept_and_what_is_not_finite_refused(encoders, collection, monkeypatch):
    root, entries = collection
    (root / "0.latents.safetensors").write_bytes(b"kept")
    done = list(precompute(encoders, root, entries[:1]))
    assert done[0].files["latents.safetensors"].read(root) == b"kept"
    monkeypatch.setattr(encoders.engine, "scale_factor", float("nan"))
    with pytest.raises(ValueError, match="k1: its latents are not finite"):
        list(precompute(encoders, root, entries))
    assert not (root / "1.latents.safetensors").exists()
