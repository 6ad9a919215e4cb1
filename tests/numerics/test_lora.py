"""Low-rank updates: adapters, files of several kinds, and what is merged from them."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from scripts import merge_lora
from sgm.checkpoint import load_checkpoint, open_native
from sgm.checkpoint.lora import Update, merge, read_lora, write_lora
from sgm.convert.lora import diffusers_names
from sgm.modules.lora import adapted_layers, add_lora, merged, split_updates
from tests.foreign import folder_tensors, native_engine, tiny_diffusers_pipeline
from tests.tiny import FRAMES, tiny_engine, write_tiny_checkpoint

UNET = "model.diffusion_model"
ATTENTION = [f"{UNET}.*.attn1.to_*", f"{UNET}.*.attn2.to_v", f"{UNET}.*.attn2.to_out.0"]
EVERYTHING = [f"{UNET}.*"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def inputs(dtype=torch.float32, frames=FRAMES):
    """Of the tiny U-Net, native and diffusers': latents, levels, token, vector."""
    g = generator(7)
    shapes = ((frames, 8, 8, 8), (frames,), (frames, 1, 24), (frames, 48))
    return [torch.randn(shape, generator=g, dtype=dtype) for shape in shapes]


def call(network, *args):
    images = torch.zeros(1, len(args[0]))
    return network(*args, num_video_frames=len(args[0]), image_only_indicator=images)


def with_updates(engine, targets, rank=3, alpha=2.0):
    """Adapters whose second factor is not zero any more."""
    add_lora(engine, targets, rank, alpha, generator(1))
    for layer in adapted_layers(engine).values():
        layer.lora_up.data = torch.randn(layer.lora_up.shape, generator=generator(2))
    return engine


@pytest.fixture(scope="module")
def trained():
    """A tiny engine with adapters on its attention."""
    return with_updates(tiny_engine(), ATTENTION)


@pytest.fixture(scope="module")
def file(trained, tmp_path_factory):
    """Its updates as a file."""
    rest, updates = split_updates(trained.state_dict())
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    write_lora(updates, path, rest)
    return path


# ---------------------------------------------------------------- adapters
def test_adapters_compute_with_the_updated_weights():
    """W + alpha / r up down by hand, in every linear layer and convolution of the U-Net, float64.

    Catches: a scale left out or squared, factors swapped, a kernel flattened in another order.
    """
    engine = with_updates(tiny_engine().double(), EVERYTHING).double()
    network = engine.model.diffusion_model
    layers = adapted_layers(engine)
    kinds = {type(layer).__name__ for layer in layers.values()}
    assert kinds == {"LoraLinear", "LoraConv2d", "LoraTemporalConv3d"}
    with torch.no_grad():
        adapted = call(network, *inputs(torch.float64))
        plain = tiny_engine().double()
        for name, layer in layers.items():
            up, down = layer.lora_up.flatten(1), layer.lora_down.flatten(1)
            weight = plain.get_submodule(name).weight
            weight += (2 / 3 * up @ down).view_as(weight)
        by_hand = call(plain.model.diffusion_model, *inputs(torch.float64))
        with merged(engine):
            in_place = call(network, *inputs(torch.float64))
        again = call(network, *inputs(torch.float64))
    scale = by_hand.abs().max()
    assert (adapted - by_hand).abs().max() < 1e-10 * scale
    assert (in_place - by_hand).abs().max() < 1e-10 * scale
    assert torch.equal(again, adapted)  # catches: weights that stay merged


def test_adapters_start_as_nothing_and_learn_alone():
    """Catches: a start that changes the model, a base that gets gradients, keys that are renamed,
    adapters without gradients."""
    engine = tiny_engine()
    before = call(engine.model.diffusion_model, *inputs()).detach()
    keys = list(engine.state_dict())
    names = add_lora(engine, ATTENTION, rank=2, alpha=2)
    network = engine.model.diffusion_model
    assert torch.equal(call(network, *inputs()), before)
    rest, updates = split_updates(engine.state_dict())
    assert list(rest) == keys
    assert [f"{name}.weight" for name in names] == list(updates)
    assert all("time_stack" in n or "transformer_blocks" in n for n in names)
    assert not any(n.endswith(("attn2.to_q", "attn2.to_k")) for n in names)
    for name, parameter in engine.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    call(network, *inputs()).square().sum().backward()
    got = {name for name, p in engine.named_parameters() if p.grad is not None}
    assert got == {f"{name}.lora_{part}" for name in names for part in ("down", "up")}
    assert all(layer.lora_up.grad.abs().max() > 0 for layer in adapted_layers(engine).values())


def test_factors_in_float32_beside_a_narrow_layer():
    """Catches: types that do not go together where frozen weights are in bfloat16."""
    layer = nn.Sequential(nn.Linear(6, 5)).bfloat16()
    add_lora(layer, ["0"], 2, 2)
    x = torch.randn(3, 6)
    for enabled, given in ((True, x), (False, x.bfloat16())):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert layer(given).dtype == torch.bfloat16
    assert layer[0].lora_down.dtype == torch.float32


@pytest.mark.parametrize(
    ("targets", "rank", "message"),
    [([f"{UNET}.*.attn3"], 4, r"is named .*attn3$"), (ATTENTION, 0, "rank of 1 or more, got 0")],
)
def test_wrong_adapters_are_refused(targets, rank, message):
    with pytest.raises(ValueError, match=message):
        add_lora(tiny_engine(), targets, rank, 1)


# ---------------------------------------------------------------- files
def test_a_file_has_the_layout_of_diffusers(file, trained):
    """Catches: native names, alpha lost, settings that peft does not understand."""
    with safe_open(file, "pt") as opened:
        settings = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert settings["unet.r"] == 3
    assert settings["unet.lora_alpha"] == 2.0
    key = "unet.down_blocks.1.attentions.0.temporal_transformer_blocks.0.attn1.to_out.0"
    tensors = load_file(file)
    layer = trained.get_submodule(f"{UNET}.input_blocks.3.1.time_stack.0.attn1.to_out.0")
    assert torch.equal(tensors[f"{key}.lora_A.weight"], layer.lora_down)
    assert torch.equal(tensors[f"{key}.lora_B.weight"], layer.lora_up)
    assert key.removeprefix("unet.") in settings["unet.target_modules"]
    assert (
        len(tensors) == 2 * len(adapted_layers(trained)) == 2 * len(settings["unet.target_modules"])
    )


def renamed(file, path, style, alpha=2.0):
    """The same updates as others write them."""
    shapes = tiny_engine().state_dict()
    native = {foreign: key for key, foreign in diffusers_names(list(shapes)).items()}
    tensors = {}
    for key, value in load_file(file).items():
        layer, part = key.removeprefix("unet.").split(".lora_")
        down = part.startswith("A")
        match style:
            case "kohya":
                base = f"lora_unet_{layer.replace('.', '_')}"
                tensors[f"{base}.lora_{'down' if down else 'up'}.weight"] = value
                tensors[f"{base}.alpha"] = torch.tensor(alpha)
            case "native":
                base = native[layer].removesuffix(".weight")
                tensors[f"{base}.lora_{'down' if down else 'up'}.weight"] = value
                tensors[f"{base}.alpha"] = torch.tensor(alpha)
            case "peft":
                tensors[f"base_model.model.{layer}.lora_{part}"] = value
    if style == "peft":
        path.mkdir()
        (path / "adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": alpha}))
        save_file(tensors, path / "adapter_model.safetensors")
    else:
        save_file(tensors, path)
    return path


@pytest.mark.parametrize("name", ["kohya.safetensors", "native.safetensors", "peft"])
def test_files_of_others_are_read(file, tmp_path, name):
    """Catches: names that are not understood, an alpha that is not looked for."""
    other = renamed(file, tmp_path / name, name.partition(".")[0])
    shapes = {key: tuple(x.shape) for key, x in tiny_engine().state_dict().items()}
    ours, theirs = (read_lora(path, shapes) for path in (file, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key].delta(), theirs[key].delta()) for key in ours)


@pytest.mark.parametrize(
    ("settings", "alpha"),
    [
        ({}, 3),
        ({"lora_alpha": 6}, 6),
        ({"lora_alpha": 6, "alpha_pattern": {"attn1.to_q": 9}}, 9),
        ({"lora_alpha": 6, "use_rslora": True}, 6 * 3**0.5),
    ],
)
def test_alpha_by_the_settings_of_peft(file, tmp_path, settings, alpha):
    """Catches: alpha 1 where nothing is said, patterns and rank-stabilised scales passed over."""
    metadata = {"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in settings.items()})}
    save_file(load_file(file), tmp_path / "a.safetensors", metadata)
    shapes = {key: tuple(x.shape) for key, x in tiny_engine().state_dict().items()}
    updates = read_lora(tmp_path / "a.safetensors", shapes)
    (update,) = (u for k, u in updates.items() if "input_blocks.3.1.time_stack.0.attn1.to_q" in k)
    assert update.alpha == pytest.approx(alpha)


def test_updates_add_up_in_the_checkpoint(file, tmp_path):
    """One file at 0.5, another at -2, over float16 weights: by hand, and as the script writes it.

    Catches: rounding between two updates, the scale of one used for both, stored weights changed.
    """
    base = write_tiny_checkpoint(tmp_path / "base.safetensors", dtype=torch.float16)
    other = renamed(file, tmp_path / "other.safetensors", "kohya", alpha=0.3)
    key = f"{UNET}.input_blocks.3.1.time_stack.0.attn1.to_q.weight"
    stored = load_file(base)[key]
    update = read_lora(file, open_native(base).shapes)[key]
    unit = update.up @ update.down / 3
    wanted = (stored.float() + 0.5 * 2 * unit - 2 * 0.3 * unit).half()
    engine = tiny_engine()
    load_checkpoint(engine, base, loras=[(file, 0.5), (other, -2)])
    loaded = engine.state_dict()
    assert (loaded[key].float() - wanted.float()).abs().max() <= 2e-3 * wanted.abs().max()
    assert torch.equal(load_file(base)[key], stored)
    target = tmp_path / "merged.safetensors"
    arguments = [str(base), f"{file}:0.5", f"{other}:-2", str(target)]
    assert merge_lora.main(arguments) == 0
    written = load_file(target)
    assert written.keys() == load_file(base).keys()
    assert all(torch.equal(written[name], loaded[name]) for name in written if name in loaded)


FAULTS = {
    "rank": lambda key, x: {key: x[:2].clone()},
    "size": lambda key, x: {key: x[:, :5].clone()},
    "layer": lambda key, x: {key.replace("down_blocks.1", "down_blocks.7"): x},
    "half": lambda *_: {},
    "text": lambda key, x: {key: x, "text_encoder.layers.0.lora_A.weight": torch.ones(2, 2)},
    "dora": lambda key, x: {key.replace("lora_A.weight", "lora_magnitude_vector"): x},
    "flat": lambda key, _: {key: torch.ones(3)},
}


def faulty(file, path, fault):
    """The file with something wrong about its first update; or no such file at all."""
    tensors = load_file(file)
    first = next(key for key in tensors if key.endswith("attn1.to_q.lora_A.weight"))
    if fault == "weights":
        tensors = {"conv.weight": torch.ones(2, 2)}
    else:
        tensors |= FAULTS[fault](first, tensors.pop(first))
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("rank", "1 update misshapen .*of ranks 2 and 3 in the file"),
        ("size", r"1 update misshapen .*\[64, 5\] of ranks 3 and 3 in the file, \[64, 64\] in the"),
        ("layer", r"1 name unknown \(unet\.down_blocks\.7"),
        ("half", "to_q has half of an update"),
        ("text", r"1 name unknown \(text_encoder\.layers\.0"),
        ("dora", r"1 name unknown \(.*lora_magnitude_vector"),
        ("flat", r"expected matrices for unet\.down"),
        ("weights", r"is no LoRA file: expected tensors such as .* got conv\.weight"),
    ],
)
def test_bad_files_are_refused_in_one_line(file, tmp_path, capsys, fault, message):
    """Catches: updates that are silently left out, tracebacks, a file left half-written."""
    base = write_tiny_checkpoint(tmp_path / "base.safetensors")
    bad = faulty(file, tmp_path / "bad.safetensors", fault)
    with pytest.raises(ValueError, match=message) as error:
        read_lora(bad, open_native(base).shapes)
    assert "\n" not in str(error.value)
    assert merge_lora.main([str(base), str(bad), str(tmp_path / "merged.safetensors")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "merged.safetensors").exists()


def test_updates_of_several_ranks_are_not_written(tmp_path):
    """Catches: settings in the file that are true of some of its layers alone."""
    updates = {str(r): Update(torch.ones(r, 4), torch.ones(4, r), 1.0) for r in (1, 2)}
    with pytest.raises(ValueError, match="one rank and alpha to write, got 2 kinds"):
        write_lora(updates, tmp_path / "a.safetensors", [])


# ---------------------------------------------------------------- diffusers with peft
def diffusers_unet():
    """diffusers' U-Net with the loader of its other models, which this class does not have."""
    pytest.importorskip("peft", exc_type=ImportError)
    from diffusers.loaders.peft import PeftAdapterMixin

    pipeline = tiny_diffusers_pipeline(seed=3)
    native = native_engine(folder_tensors(pipeline))
    plain = type(pipeline.unet)
    pipeline.unet.__class__ = type("WithAdapters", (PeftAdapterMixin, plain), {})
    return pipeline.unet, native


def call_diffusers(unet, x, level, token, vector):
    """As the native U-Net is called: diffusers embeds the vector's numbers itself."""
    unet.add_time_proj = nn.Identity()
    with torch.no_grad():
        return unet(x[None], level[:1], token[:1], vector[:1], return_dict=False)[0][0]


def same_rows(*args):
    x, level, token, vector = args
    return (
        x,
        level[:1].expand(len(x)),
        token[:1].expand(len(x), -1, -1),
        vector[:1].expand(len(x), -1),
    )


def test_diffusers_loads_what_is_written_here(tmp_path):
    """Catches: names or settings that diffusers and peft read otherwise, alpha above all."""
    unet, native = diffusers_unet()
    targets = [*ATTENTION, f"{UNET}.*.time_stack.in_layers.2", f"{UNET}.*.proj_in"]
    with_updates(native, targets, rank=4, alpha=1.0)
    rest, updates = split_updates(native.state_dict())
    write_lora(updates, tmp_path / "pytorch_lora_weights.safetensors", rest)
    given = same_rows(*inputs())
    with torch.no_grad():
        ours = call(native.model.diffusion_model, *given)
    plain = call_diffusers(unet, *given)
    name = "pytorch_lora_weights.safetensors"
    unet.load_lora_adapter(tmp_path, prefix="unet", weight_name=name)
    theirs = call_diffusers(unet, *given)
    assert (ours - theirs).abs().max() < 1e-4 * ours.abs().max()
    assert (ours - plain).abs().max() > 1e-2 * ours.abs().max()


def test_what_diffusers_writes_is_loaded_here(tmp_path):
    """Catches: as above, the other way round; alphas that differ between layers."""
    unet, native = diffusers_unet()
    from peft import LoraConfig

    names = [
        foreign
        for key, foreign in diffusers_names(list(native.state_dict())).items()
        if "attn1" in key or "in_layers.2" in key
    ]
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=names,
        alpha_pattern={"attn1.to_q": 3},
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    unet.add_adapter(config)
    given = same_rows(*inputs())
    theirs = call_diffusers(unet, *given)
    unet.save_lora_adapter(tmp_path / "lora")
    native_file = tmp_path / "native.safetensors"
    state = {key: value.clone() for key, value in native.state_dict().items()}
    save_file(state, native_file)
    load_checkpoint(native, native_file, loras=[(tmp_path / "lora", 1.0)])
    with torch.no_grad():
        ours = call(native.model.diffusion_model, *given)
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_merging_nothing_gives_the_source(file, tmp_path):
    source = open_native(write_tiny_checkpoint(tmp_path / "base.safetensors"))
    assert merge(source, []) is source
