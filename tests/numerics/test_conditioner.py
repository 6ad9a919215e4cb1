"""Embedders and the conditioner: recorded outputs, resizing by hand, dropout by counting.

Recorded cases and the mistakes they have caught (each was made on purpose, in a copy):

- ``conditioner``: condition latents scaled or drawn; another order of the vector's parts; sines
  before cosines; CLIP's normalisation left out; the vector zeroed in the unconditional half.
- ``clip_preprocess``: ``align_corners=False``; no blur; another width of the blur; its axes
  exchanged; borders repeated instead of reflected.
"""

import itertools

import pytest
import torch
from torch import Tensor

from sgm.modules.encoders.clip_image import FrozenOpenCLIPImageEmbedder
from sgm.modules.encoders.conditioner import GeneralConditioner
from sgm.modules.encoders.modules import (
    ConcatTimestepEmbedderND,
    FrozenOpenCLIPImagePredictionEmbedder,
    VideoPredictionEmbedderWithEncoder,
)
from sgm.modules.encoders.resize import antialiased_resize
from sgm.util import instantiate_from_config
from tests.recorded import assert_recorded, filled, noise, recorded_config
from tests.tiny import draw_weights, tiny_config

PICTURES = ("cond_frames", "cond_frames_without_noise")
E = "sgm.modules.encoders.modules"


@pytest.fixture(scope="module")
def recorded_conditioner() -> GeneralConditioner:
    return filled(instantiate_from_config(recorded_config().conditioner_config))


def recorded_batch(case: str, frames: int) -> dict[str, Tensor]:
    image = noise(f"{case}img", 1, 3, 128, 192).tanh()
    numbers = {"fps_id": 6, "motion_bucket_id": 127, "cond_aug": 0.02}
    return {
        "cond_frames_without_noise": image,
        "cond_frames": image + 0.02 * noise(f"{case}aug", *image.shape),
        **{key: torch.full((frames,), value) for key, value in numbers.items()},
    }


@torch.no_grad()
def test_recorded_conditioning(recorded_conditioner: GeneralConditioner):
    """Catches what the head of this file lists."""
    halves = recorded_conditioner.get_unconditional_conditioning(
        recorded_batch("conditioner", 3), force_uc_zero_embeddings=PICTURES
    )
    outputs = {
        f"{half}_{place}": value
        for half, places in zip(("c", "uc"), halves, strict=True)
        for place, value in places.items()
    }
    assert_recorded("conditioner", **outputs)


@torch.no_grad()
def test_recorded_clip_preprocessing(recorded_conditioner: GeneralConditioner):
    sizes = [(576, 1024), (224, 224), (130, 310), (1024, 576)]
    preprocess = recorded_conditioner.embedders[0].open_clip.preprocess
    outputs = {
        f"{h}x{w}": preprocess(noise(f"clip_preprocess{h}{w}", 1, 3, h, w).tanh()) for h, w in sizes
    }
    assert_recorded("clip_preprocess", **{k: x[..., ::6, ::6] for k, x in outputs.items()})


# --- resizing, by hand ---


@pytest.mark.parametrize("size", [(448, 64), (90, 70), (16, 20)])
def test_resizing_has_no_preferred_direction(size: tuple[int, int]):
    """Catches: a window of an even length or off its centre, height and width exchanged."""
    x = torch.randn(1, 2, *size, dtype=torch.float64)
    out = antialiased_resize(x, 32, 24)
    torch.testing.assert_close(antialiased_resize(x.flip(2, 3), 32, 24), out.flip(2, 3))
    torch.testing.assert_close(antialiased_resize(x.mT, 24, 32), out.mT)


def test_blur_is_as_wide_as_the_reduction_asks_for():
    """A point, reduced by 9: standard deviation (9 - 1) / 2 = 4 over 17 pixels.

    Catches: a variance of 4, a deviation of 9 / 2, a blur before or after the wrong axis.
    """
    x = torch.zeros(1, 1, 99, 11, dtype=torch.float64)
    x[0, 0, 54] = 1
    weights = torch.exp(-(torch.arange(-8, 9, dtype=torch.float64) ** 2) / (2 * 4.0**2))
    weights /= weights.sum()
    out = antialiased_resize(x, 11, 11)[0, 0, :, 5]
    at = 98 * torch.arange(11) / 10  # align_corners: 9.8 pixels apart
    exact = torch.zeros(11, dtype=torch.float64)
    blurred = torch.zeros(99, dtype=torch.float64)
    blurred[46:63] = weights
    for i, position in enumerate(at.tolist()):
        exact[i] = cubic(blurred, position)
    torch.testing.assert_close(out, exact, rtol=0, atol=1e-7)  # the window is float32


def cubic(values: Tensor, position: float, a: float = -0.75) -> float:
    """Keys' cubic convolution (1981), as in torch with a = -0.75; borders repeated."""
    total = 0.0
    for i in range(int(position) - 1, int(position) + 3):
        d = abs(position - i)
        inner = (a + 2) * d**3 - (a + 3) * d**2 + 1
        outer = a * (d**3 - 5 * d**2 + 8 * d - 4)
        weight = inner if d <= 1 else outer if d < 2 else 0.0
        total += weight * float(values[min(max(i, 0), len(values) - 1)])
    return total


def test_enlarging_does_not_blur():
    """Catches: a blur also where nothing shrinks, ``align_corners=False``."""
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(antialiased_resize(x, 8, 8), x)
    out = antialiased_resize(x, 15, 15)
    torch.testing.assert_close(out[..., ::2, ::2], x)  # corners aligned: every other pixel is old


# --- embedders ---


def test_numbers_are_embedded_side_by_side():
    """SV3D gives two per row. Catches: columns interleaved, rows and columns exchanged."""
    embedder = ConcatTimestepEmbedderND(8)
    x = torch.tensor([[6.0, 127.0], [0.5, 3.0], [1.0, 2.0]])
    out = embedder(x)
    assert out.shape == (3, 16)
    assert torch.equal(out, torch.cat([embedder(x[:, 0]), embedder(x[:, 1])], 1))


CLIP = {
    "arch": {
        "embed_dim": 6,
        "vision_cfg": {
            "image_size": 32,
            "patch_size": 16,
            "width": 32,
            "head_width": 16,
            "layers": 1,
        },
    }
}


def tower(**changes) -> FrozenOpenCLIPImageEmbedder:
    embedder = FrozenOpenCLIPImageEmbedder(**(CLIP | changes))
    draw_weights(embedder, 0)
    return embedder.eval()


def test_tower_is_frozen_unless_told_otherwise():
    assert not any(p.requires_grad for p in tower().parameters())
    assert all(p.requires_grad for p in tower(freeze=False).parameters())


@torch.no_grad()
def test_tower_keeps_the_pictures_type_and_may_add_a_dimension():
    """Catches: float32 pixels for a half-precision tower, an embedding of the tower's type."""
    x = torch.randn(2, 3, 40, 50).tanh()
    full = tower()(x)
    assert torch.equal(tower(unsqueeze_dim=True)(x), full[:, None])
    half = tower().bfloat16()(x)
    assert half.dtype == torch.float32
    assert (half - full).norm() / full.norm() < 0.02  # 8 bits of mantissa, one block


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch": "ViT-Z-99"}, "no architecture 'ViT-Z-99'"),
        ({"arch": "RN50"}, "plain vision transformer, but 'layers' is"),
        ({"arch": "convnext_base"}, "plain vision transformer"),
        ({"antialias": False}, "antialias: expected true"),
    ],
)
def test_impossible_towers_are_refused(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        FrozenOpenCLIPImageEmbedder(**(CLIP | change))


@torch.no_grad()
def test_condition_frames_become_tokens_of_their_clip():
    """Catches: frames of two clips exchanged, copies laid out as (copies, clips)."""
    config = {"target": f"{E}.FrozenOpenCLIPImageEmbedder", "params": CLIP}
    embedder = FrozenOpenCLIPImagePredictionEmbedder(config, n_cond_frames=2, n_copies=3)
    frames = torch.randn(4, 3, 32, 32)
    alone = embedder.open_clip(frames)
    out = embedder(frames)
    assert out.shape == (6, 2, 6)
    for row, clip in enumerate([0, 0, 0, 1, 1, 1]):
        torch.testing.assert_close(out[row], alone[2 * clip : 2 * clip + 2])


@torch.no_grad()
def test_condition_frames_become_latents_of_their_clip():
    """Catches: a scale factor taken twice or not, chunks in another order, frames exchanged."""
    params = tiny_config().model.params.conditioner_config.params.emb_models[3].params
    changes = {"n_cond_frames": 2, "n_copies": 3, "scale_factor": 0.5}
    embedder = VideoPredictionEmbedderWithEncoder(
        **(dict(params) | changes), en_and_decode_n_samples_a_time=3
    )
    draw_weights(embedder, 0)
    frames = torch.randn(4, 3, 16, 24).tanh()
    latents = embedder.encoder.encode(frames)
    out = embedder(frames)
    assert out.shape == (6, 8, 4, 6)
    for row, clip in enumerate([0, 0, 0, 1, 1, 1]):
        expected = 0.5 * torch.cat(list(latents[2 * clip : 2 * clip + 2]))
        torch.testing.assert_close(out[row], expected)


@torch.no_grad()
def test_condition_latents_escape_autocast_and_keep_their_type():
    """Catches: a condition encoded in half precision although the file forbids it."""
    params = tiny_config().model.params.conditioner_config.params.emb_models[3].params
    embedder = instantiate_from_config(
        {"target": f"{E}.VideoPredictionEmbedderWithEncoder", "params": params}
    )
    draw_weights(embedder, 0)
    frames = torch.randn(1, 3, 16, 16).tanh()
    expected = embedder(frames)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(embedder(frames), expected)
        embedder.disable_encoder_autocast = False
        assert not torch.equal(embedder(frames), expected)
    assert embedder.double()(frames).dtype == torch.float32


# --- the conditioner ---


def numbers(key: str, outdim: int = 4, **settings) -> dict:
    params = {"outdim": outdim}
    return {
        "input_key": key,
        "target": f"{E}.ConcatTimestepEmbedderND",
        "params": params,
        **settings,
    }


@pytest.fixture(scope="module")
def conditioner() -> GeneralConditioner:
    conditioner = instantiate_from_config(tiny_config().model.params.conditioner_config)
    draw_weights(conditioner, 0)
    return conditioner.eval()


def batch_of(clips: int, frames: int) -> dict[str, Tensor]:
    rows = clips * frames
    return {
        "cond_frames": torch.randn(clips, 3, 16, 16).tanh(),
        "cond_frames_without_noise": torch.randn(clips, 3, 16, 16).tanh(),
        "fps_id": torch.full((rows,), 6),
        "motion_bucket_id": torch.full((rows,), 127),
        "cond_aug": torch.full((rows,), 0.02),
    }


@torch.no_grad()
def test_one_batch_serves_both_halves(conditioner: GeneralConditioner):
    """Catches: zeros written into what the other half shares, dropout while sampling."""
    batch = batch_of(2, 3)
    copy = {key: value.clone() for key, value in batch.items()}
    zero = {"force_uc_zero_embeddings": PICTURES}
    shared = conditioner.get_unconditional_conditioning(batch, **zero)
    twice = conditioner.get_unconditional_conditioning(batch, copy, **zero)
    for one, two in zip(shared, twice, strict=True):
        assert one.keys() == two.keys() == {"vector", "crossattn", "concat"}
        assert all(torch.equal(one[place], two[place]) for place in one)
    c, uc = shared
    assert c["crossattn"].all()
    assert not uc["crossattn"].any()
    assert not uc["concat"].any()
    assert torch.equal(c["vector"], uc["vector"])
    swapped, whole = conditioner.get_unconditional_conditioning(
        batch, force_cond_zero_embeddings=["cond_frames"]
    )
    assert not swapped["concat"].any()
    assert torch.equal(whole["concat"], c["concat"])
    assert torch.equal(swapped["crossattn"], c["crossattn"])


def test_vector_is_joined_in_the_files_order():
    """Catches: embedders sorted by name, parts added instead of joined."""
    conditioner = GeneralConditioner([numbers("b"), numbers("a", 6)])
    batch = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}
    b, a = (embedder(batch[k]) for embedder, k in zip(conditioner.embedders, "ba", strict=True))
    assert torch.equal(conditioner(batch)["vector"], torch.cat([b, a], 1))
    assert not conditioner(batch, ["a"])["vector"][:, 4:].any()


def test_rows_are_dropped_at_their_rates_and_independently():
    """20,000 rows at rates 0.1 and 0.3: within five standard deviations (0.002 to 0.003).

    Catches: one draw for all embedders or rows, the rate of keeping taken for that of dropping,
    kept rows rescaled.
    """
    rows = 20_000
    conditioner = GeneralConditioner(
        [numbers("a", ucg_rate=0.1), numbers("b", ucg_rate=0.3), numbers("c")]
    ).train()
    batch = {key: torch.ones(rows) for key in "abc"}
    generator = torch.Generator().manual_seed(0)
    parts = conditioner(batch, generator=generator)["vector"].split(4, 1)
    full = ConcatTimestepEmbedderND(4)(torch.ones(1))
    dropped = []
    for part in parts:
        empty = ~part.any(1)
        assert torch.equal(part[~empty], full.expand(int((~empty).sum()), 4))  # whole rows, as is
        dropped.append(empty)
    rates = [float(empty.float().mean()) for empty in dropped]
    assert rates == pytest.approx([0.1, 0.3, 0.0], abs=0.016)
    assert float((dropped[0] & dropped[1]).float().mean()) == pytest.approx(0.03, abs=0.006)
    again = conditioner(batch, generator=torch.Generator().manual_seed(0))["vector"]
    assert torch.equal(again, torch.cat(parts, 1))


@torch.no_grad()
def test_pictures_are_dropped_by_the_clip_and_never_in_evaluation(conditioner: GeneralConditioner):
    """An embedder of one row per clip loses clips. Catches: single frames or channels dropped."""
    batch, generator = batch_of(16, 2), torch.Generator().manual_seed(0)
    before = conditioner(batch)
    conditioner.ucg_rates = [0.5, 0.0, 0.0, 0.5, 0.0]
    try:
        same = conditioner(batch)
        out = conditioner.train()(batch, generator=generator)
    finally:
        conditioner.eval().ucg_rates = [0.0] * 5
    assert all(torch.equal(same[place], before[place]) for place in before)
    assert torch.equal(out["vector"], before["vector"])
    seen = set()
    for clip, place in itertools.product(range(16), ("crossattn", "concat")):
        kept = bool(out[place][clip].any())
        seen.add((place, kept))
        assert not kept or torch.equal(out[place][clip], before[place][clip])
    assert len(seen) == 4


def test_only_trainable_embedders_are_trained():
    """Catches: gradients kept for frozen embedders, frozen embedders in training mode."""
    config = tiny_config().model.params.conditioner_config
    config.params.emb_models[0].is_trainable = True
    config.params.emb_models[0].params.open_clip_embedding_config.params.freeze = False
    conditioner = instantiate_from_config(config).train()
    assert [embedder.training for embedder in conditioner.embedders] == [True] + [False] * 4
    out = conditioner(batch_of(1, 1))
    assert out["crossattn"].requires_grad
    assert not out["concat"].requires_grad
    assert not any(p.requires_grad for p in conditioner.embedders[3].parameters())


def test_missing_entries_are_named(conditioner: GeneralConditioner):
    batch = batch_of(1, 1)
    del batch["fps_id"], batch["cond_aug"]
    with pytest.raises(ValueError, match=r"\['fps_id', 'cond_aug'\], got \['cond_frames'"):
        conditioner(batch)
    with pytest.raises(ValueError, match=r"ConcatTimestepEmbedderND: expected an 'input_key'"):
        GeneralConditioner([{"target": f"{E}.ConcatTimestepEmbedderND", "params": {"outdim": 4}}])
