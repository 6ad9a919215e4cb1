"""The same video as diffusers' ``StableVideoDiffusionPipeline.__call__``, and where it departs.

A small random pipeline of diffusers is saved and loaded here. Both get the same picture and seed:
on the CPU, diffusers draws the noise on the picture and then the first latents from its generator,
as is done here, so that equal seeds are equal noise. Frames are in [0, 1].
"""

import inspect

import numpy as np
import pytest
import torch
from diffusers import StableVideoDiffusionPipeline
from omegaconf import OmegaConf
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from sgm import SamplingOptions, VideoPipeline
from sgm.inference.pictures import fit_picture, load_picture
from sgm.inference.specs import SPECS
from sgm.modules.encoders.resize import antialiased_resize
from tests.foreign import CLIP, TOWER, native_config, tiny_diffusers_pipeline
from tests.tiny import draw_weights

# Their scheduler converts a tensor in a way that NumPy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TOLERANCE = 1e-3  # float32 rounding through steps at noise levels of 700 and down
HEIGHT, WIDTH, FRAMES = 64, 96, 3
SAME = SamplingOptions(
    num_frames=FRAMES,
    num_steps=4,
    height=HEIGHT,
    width=WIDTH,
    seed=5,
    fps=7,
    motion_bucket_id=127,
    cond_aug=0.02,
    min_guidance=1.0,
    max_guidance=3.0,
    fit="stretch",
    decoding_t=FRAMES,
    output="tensor",
)
NAMES = {  # of options there
    "num_frames": "num_frames",
    "num_steps": "num_inference_steps",
    "height": "height",
    "width": "width",
    "fps": "fps",
    "motion_bucket_id": "motion_bucket_id",
    "cond_aug": "noise_aug_strength",
    "min_guidance": "min_guidance_scale",
    "max_guidance": "max_guidance_scale",
    "decoding_t": "decode_chunk_size",
    "videos_per_image": "num_videos_per_prompt",
}


CLIP_SIZE = {"image_size": 224, "patch_size": 56}  # diffusers' call knows no other size


@pytest.fixture(scope="module")
def theirs():
    pipeline = tiny_diffusers_pipeline(seed=1)
    tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**CLIP | CLIP_SIZE)).eval()
    draw_weights(tower, seed=2)
    pipeline.register_modules(image_encoder=tower)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffusers")
    theirs.save_pretrained(folder / "weights")
    arch = {"embed_dim": CLIP["projection_dim"], "vision_cfg": TOWER | CLIP_SIZE}
    tower = "conditioner_config.params.emb_models.0.params.open_clip_embedding_config.params.arch"
    OmegaConf.save(native_config(**{tower: arch}), folder / "model.yaml")
    files = {"config": folder / "model.yaml", "ckpt_path": folder / "weights"}
    return VideoPipeline.from_spec("svd_tiny", **files, device="cpu", dtype="float32")


def picture(height=HEIGHT, width=WIDTH):
    """Smooth colours with fine noise, so that every way of resizing it shows."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (5, 7, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    noisy = smooth + 25 * rng.standard_normal((height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def call(theirs, image, options, **changes):
    """What diffusers makes of the same options: (videos, frames, 3, h, w)."""
    asked = {theirs: getattr(options, ours) for ours, theirs in NAMES.items()}
    generator = torch.Generator().manual_seed(options.seed)
    given = asked | {"generator": generator, "output_type": "pt"} | changes
    return theirs(image, **given).frames


def difference(a, b):
    return (a - b).abs().max().item()


@pytest.fixture(scope="module")
def usual(ours):
    """The frames that ``SAME`` gives here."""
    return ours(picture(), SAME)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"seed": 6},
        {"num_steps": 7},
        {"num_frames": 2},
        {"height": 96, "width": 64},
        {"fps": 20},
        {"motion_bucket_id": 20},
        {"cond_aug": 0.3},
        {"min_guidance": 1.5, "max_guidance": 2.5},
        {"min_guidance": 1.0, "max_guidance": 1.0},  # diffusers then leaves the second half out
        {"decoding_t": 2},
    ],
    ids=str,
)
def test_frames_agree(ours, theirs, usual, changes):
    """Catches any difference in noise levels, conditioning, guidance, scaling or decoding; every
    change of an option must show in the frames, or their agreement would say nothing of it."""
    options = SAME.replace(**changes)
    image = picture(options.height, options.width)
    frames = ours(image, options)
    assert difference(frames, call(theirs, image, options)[0]) < TOLERANCE
    if changes and frames.shape == usual.shape:
        assert difference(frames, usual) > 3 * TOLERANCE


def test_given_noise_is_their_latents(ours, theirs, usual):
    """Catches noise that is scaled twice or not at all, or drawn although it is given."""
    image = picture()
    shape = (FRAMES, ours.latent_channels, HEIGHT // ours.downsampling, WIDTH // ours.downsampling)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    frames = ours(image, SAME, noise=noise)
    assert difference(frames, call(theirs, image, SAME, latents=noise[None])[0]) < TOLERANCE
    assert difference(frames, usual) > 3 * TOLERANCE


def test_latents_agree(ours, theirs):
    """Catches another scale of undecoded latents."""
    image = picture()
    latents = ours(image, SAME.replace(output="latents"))
    expected = call(theirs, image, SAME, output_type="latent")[0]
    assert difference(latents, expected) < TOLERANCE * expected.abs().max().item()


# ---------------------------------------------------------------- where diffusers departs
def test_departure_defaults():
    """Guidance is 1 to 3 and steps are 25 for every model of diffusers; the original's differ by
    model. All frames are decoded at once; the original decodes 14."""
    signature = inspect.signature(StableVideoDiffusionPipeline.__call__).parameters
    defaults = {ours: signature[theirs].default for ours, theirs in NAMES.items()}
    assert (defaults["min_guidance"], defaults["max_guidance"]) == (1.0, 3.0)
    assert (defaults["num_steps"], defaults["decoding_t"]) == (25, None)
    for name, expected in (("svd", (1.0, 2.5, 25, 14)), ("svd_xt", (1.5, 3.0, 30, 14))):
        row = SPECS[name]
        assert (row.min_guidance, row.max_guidance, row.num_steps, row.decoding_t) == expected
    common = {"fps": 7, "motion_bucket_id": 127, "cond_aug": 0.02, "videos_per_image": 1}
    assert common.items() <= defaults.items()
    usual = SamplingOptions()
    assert (usual.fps, usual.motion_bucket_id) == (7, 127)


def test_departure_fps(ours, theirs):
    """``fps`` is one more than what the model is told, there as with ``fps`` here; the original's
    ``fps_id`` is the told number itself."""
    image = picture()
    expected = call(theirs, image, SAME, fps=21)[0]
    assert difference(ours(image, SAME.replace(fps_id=20)), expected) < TOLERANCE
    assert difference(ours(image, SAME.replace(fps_id=21)), expected) > TOLERANCE / 3


def test_departure_noise_on_the_picture(ours, theirs):
    """``noise_aug_strength`` is the standard deviation, added to the picture in [-1, 1], and is
    told to the model as it is: no logarithm, no square, as with ``cond_aug``."""
    seen = {}
    encode = theirs.vae.encode
    theirs.vae.encode = lambda image: seen.update(image=image) or encode(image)
    try:
        call(theirs, picture(), SAME, noise_aug_strength=0.5)
    finally:
        theirs.vae.encode = encode
    clean = fit_picture(load_picture(picture()), HEIGHT, WIDTH)
    drawn = torch.randn(clean.shape, generator=torch.Generator().manual_seed(SAME.seed))
    assert difference(seen["image"][0], clean + 0.5 * drawn) < 1e-5


def test_departure_resized_picture(ours, theirs):
    """A picture of another size: diffusers stretches it (Lanczos, in 8 bits) for the autoencoder,
    as ``fit="stretch"`` does, but CLIP sees the picture as it was given, where the original and
    this project show it the picture at the video's size. Both reduce it to CLIP's size alike."""
    image = picture(150, 170)
    stretched = fit_picture(load_picture(image), HEIGHT, WIDTH, "stretch")
    assert difference(theirs.video_processor.preprocess(image, HEIGHT, WIDTH)[0], stretched) < 0.02
    embedder = ours.engine.conditioner.embedders[0].open_clip
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.inference_mode():
        embedding, as_here = embedder(pixels), embedder(stretched[None])
        (expected,) = theirs._encode_image(image, "cpu", 1, False)
    assert difference(embedding, expected) < 1e-4 * expected.abs().max()
    assert difference(as_here, expected) > 1e-2 * expected.abs().max()
    frames, there = ours(image, SAME), call(theirs, image, SAME)[0]
    assert difference(frames, there) > TOLERANCE
    # Nothing else differs: given a picture that needs no resizing, the frames are the same.
    resized = image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    assert difference(ours(resized, SAME), call(theirs, resized, SAME)[0]) < TOLERANCE


def test_departure_size_of_clip(theirs):
    """CLIP's size is 224 there, whatever the image encoder's; here it is the tower's own."""
    from diffusers.pipelines.stable_video_diffusion import pipeline_stable_video_diffusion as module

    assert "(224, 224)" in inspect.getsource(module.StableVideoDiffusionPipeline._encode_image)
    x = torch.rand(1, 3, 300, 500, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = module._resize_with_antialiasing(x, (224, 224))
    assert difference(antialiased_resize(x, 224, 224), expected) < 1e-5


def test_departure_several_videos(ours, theirs):
    """Several videos share the noise on the picture there, and their latents follow each other in
    one stream; here video k is the one that ``seed + k`` gives alone. The first is the same."""
    image = picture()
    there = call(theirs, image, SAME.replace(videos_per_image=2))
    here = ours(image, SAME.replace(videos_per_image=2))
    assert difference(here[0], there[0]) < TOLERANCE
    assert difference(here[1], there[1]) > TOLERANCE
    generator = torch.Generator().manual_seed(SAME.seed)
    torch.randn(3, HEIGHT, WIDTH, generator=generator)  # the noise on the picture
    h, w = HEIGHT // ours.downsampling, WIDTH // ours.downsampling
    noise = torch.randn(2, FRAMES, ours.latent_channels, h, w, generator=generator)
    assert difference(ours(image, SAME, noise=noise[1]), there[1]) < TOLERANCE
