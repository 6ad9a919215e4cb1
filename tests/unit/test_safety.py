"""The safety filter: CLIP as transformers and open_clip have it, heads in closed form, refusals."""

import json
import math
import zipfile

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU
from open_clip.transformer import VisionTransformer as OpenClipTower
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

from sgm.inference.safety import HEADS, SafetyFilter, blur, find_filter
from sgm.towers import CLIP_MEAN, CLIP_STD
from tests.judge import ARCH, write_filter, write_head

SIDE = ARCH["vision_cfg"]["image_size"]


def noise(count=3, height=SIDE, width=SIDE, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def normalised(frames):
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


def theirs(folder, act):
    """A small CLIP of transformers' with random weights, written into a filter's folder."""
    config = CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=144,
        num_hidden_layers=2,
        num_attention_heads=4,
        patch_size=8,
        image_size=SIDE,
        projection_dim=24,
        hidden_act=act,
    )
    torch.manual_seed(0)
    model = CLIPVisionModelWithProjection(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(write_filter(folder))
    return model


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_embeddings_are_those_of_transformers(tmp_path, act):
    """Catches: heads cut otherwise, the other GELU, a normalised embedding, other colours."""
    model = theirs(tmp_path, act)
    with torch.no_grad():
        expected = model(pixel_values=normalised(noise(count=9))).image_embeds
    found = SafetyFilter(find_filter(tmp_path)).embed(noise(count=9))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_whole_clip_serves_as_well_as_its_tower(tmp_path):
    """Catches: the text side's tensors, or a description below ``vision_config``, in the way."""
    theirs(tmp_path, "gelu")
    expected = SafetyFilter(find_filter(tmp_path)).embed(noise())
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    text = {"text_model.final_layer_norm.weight": torch.ones(3), "logit_scale": torch.ones(())}
    save_file(load_file(weights) | text, weights)
    config.write_text(json.dumps({"vision_config": json.loads(config.read_text())}))
    torch.testing.assert_close(SafetyFilter(find_filter(tmp_path)).embed(noise()), expected)


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "weights.pt"])
def test_embeddings_are_those_of_open_clip(tmp_path, name):
    vision = open_clip.CLIPVisionCfg(**ARCH["vision_cfg"])
    tower = OpenClipTower(
        image_size=SIDE,
        patch_size=vision.patch_size,
        width=vision.width,
        layers=vision.layers,
        heads=vision.width // vision.head_width,
        mlp_ratio=vision.mlp_ratio,
        output_dim=ARCH["embed_dim"],
        act_layer=QuickGELU,
    )
    write_filter(tmp_path)
    (tmp_path / "open_clip_model.safetensors").unlink()
    weights = {f"visual.{key}": value for key, value in tower.state_dict().items()}
    weights["token_embedding.weight"] = torch.ones(3, 4)
    (torch.save if name.endswith("pt") else save_file)(weights, tmp_path / name)
    with torch.no_grad():
        expected = tower.eval()(normalised(noise()))
    found = SafetyFilter(find_filter(tmp_path)).embed(noise())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_middle_square_is_looked_at_as_transformers_processor_does(tmp_path):
    """Catches: the frame squeezed, a corner cut out, a resize without smoothing."""
    judge = SafetyFilter(find_filter(write_filter(tmp_path)))
    wide = noise(1, 100, 180)
    middle = Image.fromarray(wide[0, :, 40:140])
    process = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE)
    with torch.no_grad():
        expected = judge.tower(process(middle, return_tensors="pt")["pixel_values"])
    # The processor rounds the resized picture to 8 bits.
    torch.testing.assert_close(judge.embed(wide), expected, rtol=0.02, atol=0.02)
    outside = wide.copy()
    outside[:, :, :40] = 0
    torch.testing.assert_close(judge.embed(outside), judge.embed(wide), rtol=0, atol=0)


def test_scores_are_logistic_and_a_finding_of_either_head_in_one_frame_counts(tmp_path):
    write_filter(tmp_path)
    frames = noise()
    odd, *others = SafetyFilter(find_filter(tmp_path)).embed(frames).double().numpy()
    direction = odd - np.mean(others, axis=0)
    direction /= np.square(direction).sum()
    bias = -(odd + np.mean(others, axis=0)) @ direction / 2
    for head in HEADS:
        write_head(tmp_path / head, direction, bias)
        judge = SafetyFilter(find_filter(tmp_path))
        column = judge.scores(frames)[:, HEADS.index(head)]
        logits = np.stack([odd, *others]) @ direction + bias
        expected = torch.tensor([1 / (1 + math.exp(-logit)) for logit in logits])
        torch.testing.assert_close(column, expected.float(), rtol=1e-4, atol=1e-4)
        assert judge.flags(frames)
        assert judge.flags(frames[::-1])
        assert not judge.flags(frames[1:])
        write_head(tmp_path / head)
    assert not SafetyFilter(find_filter(tmp_path)).flags(frames)


def test_heads_written_as_a_matrix_are_the_same(tmp_path):
    write_filter(tmp_path)
    weights = np.linspace(-1, 1, ARCH["embed_dim"])
    write_head(tmp_path / HEADS[0], weights)
    expected = SafetyFilter(find_filter(tmp_path)).scores(noise())
    write_head(tmp_path / HEADS[0], weights[None])
    torch.testing.assert_close(SafetyFilter(find_filter(tmp_path)).scores(noise()), expected)


def test_blurring_is_a_gaussian_of_a_tenth_of_the_shorter_side():
    edge = np.zeros((2, 100, 200, 3), np.uint8)
    edge[:, :, 100:] = 200
    blurred = blur(edge)
    assert (blurred.shape, blurred.dtype) == (edge.shape, np.uint8)
    distances = np.arange(200) - 99.5
    expected = [100 * (1 + math.erf(each / 10 / math.sqrt(2))) for each in distances]
    assert np.abs(blurred[1, 50, :, 1] - expected).max() < 4  # Pillow's is three boxes


def take_head(folder):
    (folder / HEADS[0]).unlink()


def cut_head(folder):
    path = folder / HEADS[1]
    path.write_bytes(path.read_bytes()[:60])


def widen_head(folder):
    write_head(folder / HEADS[1], np.zeros(25))


def take_weights(folder):
    (folder / "open_clip_model.safetensors").unlink()


def cut_weights(folder):
    path = folder / "open_clip_model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def take_tensor(folder):
    path = folder / "open_clip_model.safetensors"
    weights = load_file(path)
    del weights["visual.ln_pre.bias"]
    save_file(weights, path)


def take_description(folder):
    (folder / "open_clip_config.json").unlink()


def spoil_description(folder):
    (folder / "open_clip_config.json").write_text("{")


def empty_description(folder):
    (folder / "open_clip_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (take_head, "p_head_v1.npz missing"),
        (cut_head, "w_head_v1.npz is no npz file with weights and biases"),
        (widen_head, "w_head_v1.npz: expected 24 weights, as CLIP's embedding is wide, .* got 25"),
        (take_weights, "a folder without weights"),
        (cut_weights, "cannot be loaded: it is damaged"),
        (take_tensor, "1 key missing.*ln_pre.bias"),
        (take_description, "does not fit the model"),  # OpenAI's ViT-L/14 is larger
        (spoil_description, "open_clip_config.json is no JSON"),
        (empty_description, "'layers'|'embed_dim' is missing"),
    ],
)
def test_an_unfit_folder_is_refused_in_a_line(tmp_path, spoil, words):
    spoil(write_filter(tmp_path))
    with pytest.raises(ValueError, match=rf"^safety_filter '.*': .*{words}") as error:
        find_filter(tmp_path)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        find_filter(tmp_path / "none")


def test_transformers_weights_need_their_description(tmp_path):
    theirs(tmp_path, "gelu")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        find_filter(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_act": "relu"}')
    with pytest.raises(ValueError, match=r"not of a CLIP with a plain tower"):
        find_filter(tmp_path)


def test_openais_own_archive_is_told_from_weights(tmp_path):
    with zipfile.ZipFile(write_filter(tmp_path) / "ViT-L-14.pt", "w") as file:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            file.writestr(f"ViT-L-14/{name}", b"")
    with pytest.raises(ValueError, match=r"ViT-L-14\.pt is a TorchScript program.*safetensors"):
        find_filter(tmp_path)


def test_weights_that_give_no_numbers_are_refused_at_once(tmp_path):
    """Catches the silent pass: what is not a number is above no threshold."""
    path = write_filter(tmp_path) / "open_clip_model.safetensors"
    weights = load_file(path)
    weights["visual.ln_post.bias"][0] = math.nan
    save_file(weights, path)
    with pytest.raises(ValueError, match="no finite numbers"):
        SafetyFilter(find_filter(tmp_path))
