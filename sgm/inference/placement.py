"""The parts of a model on the device where they compute: all at once, or each for its stage."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from sgm import kernels
from sgm.device import has_fast_bfloat16
from sgm.inference.budget import HIGH, MemoryPlan, Needs, Stage, free_bytes, plan_memory
from sgm.inference.dtypes import decoder_dtype, first_stage_dtype
from sgm.inference.levels import DEFAULT_LEVEL, LEVELS, Level
from sgm.inference.lockstep import DecoderInStep
from sgm.inference.needs import Job, blocks_of, count_needs, meta_copy
from sgm.inference.optimized import OptimizedDecoder, OptimizedNetwork, Place
from sgm.inference.optimized.eight_bits import require_eight_bits, use_eight_bits
from sgm.inference.optimized.layers import lay_out_for_accelerator
from sgm.inference.optimized.scaling import FLOAT16_SCALE, scale_stream
from sgm.inference.optimized.unet import OptimizedUNet
from sgm.inference.settings import Settings, guidance_halves
from sgm.inference.streaming import InTurn, Streamed, give_back_pinned, weight_bytes, whole
from sgm.models.diffusion import DiffusionEngine

Report = Callable[[int, int], None]


class Placement:
    """A loaded model, ready to compute under a memory plan.

    The first stage's encoder and the condition autoencoder's decoder are not used: mapped from a
    file, they are never read. Optimised networks are made of weights of their own; the engine's
    stay as they are stored.

    Args:
        engine: with weights.
        device: where to compute.
        dtype: of the U-Net; the autoencoders may need a wider one.
        optimize: a level of :data:`sgm.inference.levels.LEVELS`.
        plan: what is on the device at once. Only CUDA devices have memory of their own, so
            elsewhere nothing is moved between stages.
        report: called with the bytes that are placed, and all that will be.

    Attributes:
        dtype: of the U-Net.
        decoder_dtype: of the decoder.
        level: what was done to the networks.
        network: called as the engine's ``model``.
        decoder: called as the first stage's ``decoder``.

    Raises:
        ValueError: a plan that a level does not have, or a device or type that it is not for.
    """

    def __init__(
        self,
        engine: DiffusionEngine,
        device: torch.device,
        dtype: torch.dtype,
        optimize: str = DEFAULT_LEVEL,
        plan: MemoryPlan = HIGH,
        report: Report | None = None,
    ) -> None:
        level = LEVELS[optimize]
        if plan != HIGH and not level.moves:
            *others, last = (name for name, each in LEVELS.items() if each.moves)
            able = f"{', '.join(others)} or {last}"
            raise ValueError(f"memory {plan.name} needs --optimize {able}, got {optimize}")
        require_device(device, dtype, level)
        engine.eval().requires_grad_(False)
        self.engine, self.device, self.plan = engine, device, plan
        self.dtype, self.level = dtype, level
        moves = plan.unload_between_stages and device.type == "cuda"
        self._loading = _Loading(torch.device("cpu") if moves else device, report)
        encoders = list(encoding_parts(engine, dtype))
        self.decoder_dtype = decoding = decoder_dtype(device, dtype, optimize)
        decoder: Any = engine.first_stage_model.decoder
        # Around the decoder: the 1x1 convolution of the image autoencoder.
        self._around = _without(engine.first_stage_model, "encoder", "decoder")
        parts = [*encoders, *((part, decoding) for part in self._around)]
        used = [engine.model, decoder, *(part for part, _ in parts)]
        self._loading.total = sum(tensor.nbytes for part in used for tensor in _held(part))
        for part, number in parts:
            self._loading.bring(part, number)
        self.network: Callable[..., Tensor] = engine.model
        self.decoder: nn.Module = decoder
        if level.derived:
            self.network = self._make_network(dtype, level)
            self.decoder = self._make_decoder(decoding)
            if device.type != "cpu":
                for each in (self.network.unet, self.decoder):
                    lay_out_for_accelerator(each)
        else:
            self._loading.bring(engine.model, dtype)
            self._loading.bring(decoder, decoding)
        engine.denoiser.to(device)  # a discrete one has a table of noise levels
        self._loading.finish(device)
        self._stages = self._make_stages([part for part, _ in encoders]) if moves else {}

    def _make_network(self, dtype: torch.dtype, level: Level) -> OptimizedNetwork:
        clips, place = 1 if self.plan.halves_in_turn else None, self._loading.to(dtype)
        network = OptimizedNetwork(self.engine.model, place, clips, level.reuse, level.records)
        _shape(network.unet, self.plan, level)
        return network

    def _make_decoder(self, dtype: torch.dtype) -> nn.Module:
        decoder: Any = self.engine.first_stage_model.decoder
        if dtype == torch.float16:
            decoder = scale_stream(decoder, FLOAT16_SCALE)
        if not self.plan.decode_in_step:
            return OptimizedDecoder(decoder, self._loading.to(dtype))
        self._loading.bring(decoder, dtype)
        store = "cpu" if self.plan.park_on_host else None
        return DecoderInStep(decoder, store=store)

    def _make_stages(self, encoders: list[nn.Module]) -> dict[Stage, list[Streamed | InTurn]]:
        """For each stage, what brings its weights to the device."""
        network: Any = self.network
        unet = network.unet
        blocks = blocks_of(unet)
        rest = [unet.embed, unet.shifts, unet.first, unet.norm_out, unet.conv_out]
        resident = 0 if self.plan.stream_weights else sum(map(weight_bytes, blocks))
        return {
            "encoding": [InTurn(encoders, self.device)],
            "sampling": [whole(rest, self.device), Streamed(blocks, self.device, resident)],
            "decoding": [whole([self.decoder, *self._around], self.device)],
        }

    @contextmanager
    def running(self, stage: Stage) -> Iterator[None]:
        """Have the weights of a stage on the device while the block runs."""
        with ExitStack() as stack:
            if isinstance(self.network, OptimizedNetwork):
                stack.callback(self.network.forget)  # what a run keeps is for one stage alone
            if self.plan.park_on_host and self.device.type == "cuda":
                stack.callback(give_back_pinned)
            for streamed in self._stages.get(stage, []):
                stack.enter_context(streamed)
            yield


def require_device(device: torch.device, dtype: torch.dtype, level: Level) -> None:
    """Refuse a type or a level that a device is not for.

    Raises:
        ValueError: with what would do.
    """
    if device.type == "cuda" and dtype == torch.bfloat16 and not has_fast_bfloat16(device):
        raise ValueError(f"{device} does not multiply bfloat16: take --dtype float16")
    if level.records and device.type != "cuda":
        raise ValueError(f"--optimize graphs needs a CUDA device, got {device}: take exact")
    if level.eight_bits:
        require_eight_bits(device, dtype)


def encoding_parts(
    engine: DiffusionEngine, dtype: torch.dtype
) -> Iterator[tuple[nn.Module, torch.dtype]]:
    """What the conditioning is computed by, with its types."""
    autoencoder_dtype = first_stage_dtype(dtype)
    for embedder in engine.conditioner.embedders:
        encoder = getattr(embedder, "encoder", None)
        if isinstance(encoder, nn.Module):
            yield from ((part, autoencoder_dtype) for part in _without(encoder, "decoder"))
        else:
            yield embedder, dtype


def choose_plan(
    settings: Settings, needs: Callable[[], Needs], free: int | None = None
) -> MemoryPlan:
    """The memory plan that a run's options ask for; for ``auto`` the fastest that fits.

    Args:
        settings: of the run.
        needs: counts what it takes; called only where that matters.
        free: bytes that the device has for it; None for what is free now.
    """
    options = settings.options
    device = torch.device(str(options.device))
    mode = options.memory or "auto"
    if mode == "auto" and not (device.type == "cuda" and LEVELS[str(options.optimize)].moves):
        return HIGH
    free = free_bytes(device) if free is None else free
    return plan_memory(mode, free, needs)


def needs_of(engine: DiffusionEngine, settings: Settings) -> Needs:
    """What a run takes on its device; counted under each plan when it is first asked for.

    Args:
        engine: with its weights wherever they are, on the meta device too.
        settings: of the run.
    """
    options = settings.options
    device = torch.device(str(options.device))
    dtype: torch.dtype = getattr(torch, str(options.dtype))
    level = LEVELS[str(options.optimize)]
    plain: Any = engine.model.diffusion_model
    f = engine.first_stage_model.downsampling
    unit = f * plain.downsampling
    height, width = (ceil(side / unit) * plain.downsampling for side in settings.size)
    job = Job(
        frames=settings.frames,
        size=(height, width),
        clips=guidance_halves(settings),
        decoding_t=options.decoding_t or settings.frames,
        dtype=dtype,
        wide=decoder_dtype(device, dtype, str(options.optimize)),
        form="sizes" if kernels.has_triton(device) else "reference",
    )

    def make_network(plan: MemoryPlan) -> nn.Module:
        if not level.derived:
            return meta_copy(plain, dtype)
        unet = OptimizedUNet(plain, partial(torch.Tensor.to, device="meta", dtype=dtype))
        _shape(unet, plan, level)
        lay_out_for_accelerator(unet)
        return unet

    encoders = list(encoding_parts(engine, dtype))
    return count_needs(engine, job, encoders, make_network, level.derived)


def _shape(unet: OptimizedUNet, plan: MemoryPlan, level: Level) -> None:
    """Give a network the form that a plan and a level ask for."""
    unet.split_feed_forwards(plan.feed_forward_chunks)
    if level.eight_bits:
        use_eight_bits(unet)


class _Loading:
    """Brings tensors to a device, and reports how many bytes of them there are so far."""

    def __init__(self, device: torch.device, report: Report | None) -> None:
        self.device, self.report = device, report
        self.done = self.total = 0

    def to(self, dtype: torch.dtype) -> Place:
        """A function that brings a tensor to the device and, if it is of numbers, this type."""

        def place(tensor: Tensor) -> Tensor:
            self.done += tensor.nbytes
            if self.report:
                self.report(min(self.done, self.total), self.total)
            return tensor.detach().to(self.device, dtype if tensor.is_floating_point() else None)

        return place

    def bring(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Bring a module's own tensors."""
        place = self.to(dtype)
        for tensor in _held(module):
            tensor.data = place(tensor)

    def finish(self, device: torch.device) -> None:
        """Report the end; what a run places later goes to the device at once, and silently."""
        if self.report:
            self.report(self.total, self.total)
        self.device, self.report = device, None


def _held(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _without(module: nn.Module, *unused: str) -> list[nn.Module]:
    return [child for name, child in module.named_children() if name not in unused]
