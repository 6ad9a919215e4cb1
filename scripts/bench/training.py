"""A training step of the U-Net, beside a plain PyTorch loop around diffusers' U-Net.

Both start from the same weights and see the same latents, conditioning, noise and noise levels;
loss, clipping and optimiser (AdamW, fused) are the same, so their losses stay the same. Every loop
runs in a process of its own where memory is measured, and in one process, in turn, for times.
Shapes: b clips, t frames, z latent channels, h height, w width.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scripts.bench.inputs import COND_AUG, FPS_ID, MOTION
from scripts.bench.models import SEED, build_diffusers, build_engine, model_files
from scripts.bench.presets import DIFFUSERS, Case, Preset
from scripts.bench.processes import last_line
from scripts.bench.report import Results, gigabytes, markdown, seconds
from scripts.bench.timing import Timing, alternate, give_back
from scripts.benchmark_startup import peak_memory
from sgm.inference.settings import ModelFiles
from sgm.models.diffusion import DiffusionEngine
from sgm.modules.diffusionmodules.layers import sinusoidal_embedding
from sgm.training.optim import Optim
from sgm.training.savings import skip_idle_attention
from sgm.util import append_dims, instantiate_from_config

OURS = "this project"
LOSSES = 1e-3  # relative difference after some steps: rounding, and no more
OPTIM = Optim(lr=1e-5, weight_decay=0.01, clip=1.0)

Step = Callable[[], float]
Forward = Callable[[Tensor, Tensor], Tensor]
"""Scaled noisy latents (b, t, z, h, w) and c_noise (b,) -> the network's output, alike."""


@dataclass(frozen=True)
class Row:
    """One loop.

    Attributes:
        system: this project or diffusers.
        checkpointing: whether activations are computed again.
        seconds: of every step.
        median: of those; None where there are none.
        loss: of the last step.
        peak_bytes: most memory of a process that does nothing else; imports count.
        failure: why there are no times, or no peak.
    """

    system: str
    checkpointing: bool
    seconds: tuple[float, ...]
    median: float | None
    loss: float | None
    peak_bytes: int | None
    failure: str | None


def run(preset: Preset, files: ModelFiles, device: torch.device, results: Results) -> bool:
    """Both loops, with and without checkpointing; whether this project's is no worse."""
    case, rows = preset.cases[0], list[Row]()
    for checkpointing in (False, True):
        for name, timing in _times(files, case, device, checkpointing).items():
            peak, failure = _peak(preset, name, device, checkpointing)
            figures = timing.seconds, timing.median, timing.result, peak, timing.failure or failure
            rows.append(Row(name, checkpointing, *figures))
            results.add(training=rows)
    header = ["loop", "checkpointing", "step", "against diffusers", "peak memory", "loss"]
    title = f"{case.name}, {case.dtypes[0]}, {_millions(files)} M parameters, all of them learn."
    results.show(f"{title}\n\n{markdown(header, _cells(rows))}")
    return all(_no_worse(*pair) for pair in zip(rows[::2], rows[1::2], strict=True))


def _times(
    files: ModelFiles, case: Case, device: torch.device, checkpointing: bool
) -> dict[str, Timing]:
    """Both loops in turn; the device is empty again afterwards."""
    steps = {name: make(files, case, device, checkpointing) for name, make in LOOPS.items()}
    times = alternate(steps, device, case.stages["train"], 2)
    del steps
    give_back()
    return times


def our_loop(files: ModelFiles, case: Case, device: torch.device, checkpointing: bool) -> Step:
    """As `sgm.training` runs it; the engine's other parts are not kept, as in the other loop."""
    engine: Any = build_engine(files, device, torch.float32)
    model, network = engine.model, engine.model.diffusion_model
    network.use_checkpoint = checkpointing
    skip_idle_attention(network)
    given = _Given(files, engine, case, device)
    images = torch.zeros(case.clips, case.frames, device=device)

    def forward(x: Tensor, level: Tensor) -> Tensor:
        rows, frames = x.flatten(0, 1), case.frames
        cond = {key: value.repeat_interleave(frames, 0) for key, value in given.cond.items()}
        extra = {"num_video_frames": frames, "image_only_indicator": images}
        out = model(rows, level.repeat_interleave(frames), cond, **extra)
        return out.unflatten(0, x.shape[:2])

    return _loop(network, forward, given)


def their_loop(files: ModelFiles, case: Case, device: torch.device, checkpointing: bool) -> Step:
    """As one would write it around the model."""
    engine = build_engine(files, device, torch.float32)
    unet = build_diffusers(files, engine).unet
    if checkpointing:
        unet.enable_gradient_checkpointing()
    given = _Given(files, engine, case, device)
    condition = given.cond["concat"][:, None].expand(-1, case.frames, -1, -1, -1)
    numbers = torch.tensor([[FPS_ID, MOTION, COND_AUG]], device=device).expand(case.clips, -1)

    def forward(x: Tensor, level: Tensor) -> Tensor:
        sample = torch.cat([x, condition], dim=2)
        out: Tensor = unet(sample, level, given.cond["crossattn"], numbers, return_dict=False)[0]
        return out

    return _loop(unet, forward, given)


LOOPS = {OURS: our_loop, DIFFUSERS: their_loop}


class _Given:
    """What both loops get."""

    def __init__(
        self, files: ModelFiles, engine: DiffusionEngine, case: Case, device: torch.device
    ) -> None:
        generator = torch.Generator().manual_seed(SEED)
        network = files.config["params"]["network_config"]["params"]
        f, z = engine.first_stage_model.downsampling, network["out_channels"]
        size = case.height // f, case.width // f
        self.device, self.generator, self.clips = device, generator, case.clips
        self.half = case.dtypes[0] != "float32"
        self.dtype = getattr(torch, case.dtypes[0])

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device)

        numbers = torch.tensor([FPS_ID, MOTION, COND_AUG], device=device)
        width = network["adm_in_channels"] // len(numbers)
        vector = sinusoidal_embedding(numbers, width).flatten()
        self.latents = normal(case.clips, case.frames, z, *size)
        self.cond = {
            "concat": normal(case.clips, z, *size),
            "crossattn": normal(case.clips, 1, network["context_dim"]),
            "vector": vector.expand(case.clips, -1),
        }

    def draw(self) -> tuple[Tensor, Tensor]:
        """Noise levels (b, 1, 1, 1, 1), ``ln s ~ N(1, 1.6^2)``, and noise like the latents."""
        sigma = (1.0 + 1.6 * torch.randn(self.clips, generator=self.generator)).exp()
        noise = torch.randn(self.latents.shape, generator=self.generator)
        return append_dims(sigma, 5).to(self.device), noise.to(self.device)


def _loop(network: nn.Module, forward: Forward, given: _Given) -> Step:
    """A step with EDM's preconditioning and weights for velocities (Karras et al. 2022)."""
    network.train().requires_grad_(True)
    parameters = list(network.parameters())
    optimizer = OPTIM.build(parameters)
    clean = given.latents

    def step() -> float:
        sigma, noise = given.draw()
        noisy, norm = clean + sigma * noise, sigma.square() + 1
        cast = torch.autocast(given.device.type, given.dtype) if given.half else nullcontext()
        with torch.inference_mode(False), torch.enable_grad():
            with cast:
                out = forward(noisy / norm.sqrt(), 0.25 * sigma.flatten().log())
            denoised = noisy / norm - out.float() * sigma / norm.sqrt()
            loss = (norm / sigma.square() * (denoised - clean).square()).mean()
            loss.backward()
        OPTIM.clip_(parameters)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def _peak(
    preset: Preset, system: str, device: torch.device, checkpointing: bool
) -> tuple[int | None, str | None]:
    """Most memory of a process that runs this loop alone, or why there is no figure.

    See `_measure_peak`.
    """
    job: dict[str, Any] = {
        "model": preset.model,
        "changes": dict(preset.changes),
        "case": asdict(preset.cases[0]),
    }
    job |= {"system": system, "device": str(device), "checkpointing": checkpointing}
    try:
        return int(last_line("scripts.bench.training", json.dumps(job))), None
    except RuntimeError as error:
        return None, str(error)


def _measure_peak(job: Mapping[str, Any]) -> int:
    """Two steps in this process; the largest resident size, on CUDA of the device's tensors."""
    case, device = Case(**job["case"]), torch.device(job["device"])
    files = model_files(Preset(job["model"], changes=job["changes"]))
    step = LOOPS[job["system"]](files, case, device, job["checkpointing"])
    step()
    step()
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_memory()


def _no_worse(ours: Row, theirs: Row) -> bool:
    """Not slower, not more memory, and the same loss."""
    if not (ours.median and theirs.median and ours.peak_bytes and theirs.peak_bytes):
        return False
    same = abs((ours.loss or 0) - (theirs.loss or 0)) <= LOSSES * abs(theirs.loss or 0)
    return same and ours.median <= theirs.median and ours.peak_bytes <= theirs.peak_bytes


def _cells(rows: list[Row]) -> Iterator[list[str]]:
    for row in rows:
        other = (r for r in rows if (r.system, r.checkpointing) == (DIFFUSERS, row.checkpointing))
        theirs = next((r.median for r in other), None)
        yield [
            *(row.system, "yes" if row.checkpointing else "no"),
            seconds(row.median) or row.failure or "",
            f"{theirs / row.median:.2f}" if theirs and row.median else "",
            gigabytes(row.peak_bytes) or row.failure or "",
            f"{row.loss:.4f}" if row.loss is not None else "",
        ]


def _millions(files: ModelFiles) -> int:
    with torch.device("meta"):
        network = instantiate_from_config(files.config["params"]["network_config"])
    return round(sum(p.numel() for p in network.parameters()) / 1e6)


if __name__ == "__main__":
    print(_measure_peak(json.loads(sys.argv[1])))
