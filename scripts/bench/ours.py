"""This project as a system to measure.

Shapes: t frames, z latent channels, h height, w width, f pixels per latent.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from scripts.bench.inputs import COND_AUG, FPS_ID, GUIDANCE, MOTION, NOISE_LEVEL, Inputs
from scripts.bench.models import COMPILATION, SEED
from scripts.bench.timing import Calls
from sgm.inference import SamplingOptions, VideoPipeline
from sgm.inference.generation import Generation
from sgm.inference.optimized import OptimizedNetwork
from sgm.inference.optimized.layers import lay_out_for_accelerator
from sgm.inference.pictures import load_picture
from sgm.inference.settings import ModelFiles
from sgm.inference.videos import Video
from sgm.models.diffusion import DiffusionEngine
from sgm.modules.diffusionmodules.layers import sinusoidal_embedding


class Ours:
    """This project."""

    def __init__(
        self,
        files: ModelFiles,
        engine: DiffusionEngine,
        device: torch.device,
        dtype: torch.dtype,
        optimize: str,
        compiled: bool = False,
    ) -> None:
        self.pipeline = VideoPipeline(engine, files, device, dtype, optimize)
        if compiled:
            network: Any = self.pipeline.placement.network
            lay_out_for_accelerator(network.unet)  # the compiler has layouts of its own
            network.unet.compile(**COMPILATION)

    def calls(self, given: Inputs) -> Calls:
        """See :class:`System`."""
        case, pipeline = given.case, self.pipeline
        engine, networks = pipeline.engine, pipeline.placement
        options = SamplingOptions(
            num_frames=case.frames,
            num_steps=case.steps,
            height=case.height,
            width=case.width,
            fps_id=int(FPS_ID),
            motion_bucket_id=int(MOTION),
            cond_aug=COND_AUG,
            min_guidance=GUIDANCE[0],
            max_guidance=GUIDANCE[1],
            seed=SEED,
            fit="stretch",
            decoding_t=case.decoding_t,
            optimize=pipeline.optimize,
            output="tensor",
        )
        conditioning = self._conditioning(given)
        level = torch.tensor([NOISE_LEVEL], device=pipeline.device)
        extra = {
            "num_video_frames": case.frames,
            "image_only_indicator": torch.zeros(case.clips, case.frames, device=pipeline.device),
        }
        video, number = Video(given.frames, int(FPS_ID) + 1), count()

        def decode() -> Tensor:
            parts = engine.decode_chunks(given.latents, case.decoding_t, networks.decoder)
            return torch.cat(list(parts))

        calls: Calls = {
            "encode": lambda: self._encode(given.picture, options),
            "unet": lambda: networks.network(given.x, level, conditioning, **extra),
            "decode": decode,
            "write": lambda: video.save(given.folder / f"ours-{next(number)}.mp4"),
            "video": lambda: pipeline(given.picture, options, noise=given.latents),
        }
        optimized = networks.network
        if isinstance(optimized, OptimizedNetwork):
            calls["condition"] = lambda: optimized.unet.condition(conditioning, case.frames)
        if "load" in case.stages:
            calls["load"] = self._loading(given.folder)
        return calls

    def _conditioning(self, given: Inputs) -> dict[str, Tensor]:
        network: Any = self.pipeline.engine.model.diffusion_model
        numbers = torch.tensor([FPS_ID, MOTION, COND_AUG], device=self.pipeline.device)
        width = network.label_emb[0][0].in_features // len(numbers)
        vector = sinusoidal_embedding(numbers, width).flatten()
        return {
            "concat": given.concat,
            "crossattn": given.context,
            "vector": vector.expand(len(given.x), -1),
        }

    def _encode(self, image: Image.Image, options: SamplingOptions) -> Any:
        picture = load_picture(image)
        settings = self.pipeline.settings(picture, options)
        generation = Generation(self.pipeline.placement, picture, settings)
        f = self.pipeline.downsampling
        return generation.encode(torch.randn(3, *(f * side for side in generation.shape[2:])))

    def _loading(self, folder: Path) -> Callable[[], Any]:
        pipeline, file = self.pipeline, folder / "ours.safetensors"
        if not file.exists():
            state = pipeline.engine.state_dict()
            save_file({key: value.contiguous() for key, value in state.items()}, file)
        options = SamplingOptions(
            device=str(pipeline.device),
            dtype=str(pipeline.dtype).removeprefix("torch."),
            optimize=pipeline.optimize,
            memory="high",
        )
        files = replace(pipeline.files, checkpoint=file)

        def load() -> None:
            VideoPipeline.load(files, options)

        return load
