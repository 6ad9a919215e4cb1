"""diffusers as a system to measure."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.bench.inputs import COND_AUG, FPS_ID, GUIDANCE, MOTION, NOISE_LEVEL, Inputs
from scripts.bench.models import COMPILATION, SEED, build_diffusers, lay_channels_last
from scripts.bench.timing import Calls
from sgm.inference.settings import ModelFiles
from sgm.models.diffusion import DiffusionEngine


class Diffusers:
    """diffusers, as its documentation says; its inputs are prepared outside of what is timed."""

    def __init__(
        self,
        files: ModelFiles,
        engine: DiffusionEngine,
        device: torch.device,
        dtype: torch.dtype,
        compiled: bool = False,
    ) -> None:
        self.device, self.dtype = device, dtype
        self.pipeline = build_diffusers(files, engine)
        self.pipeline.vae.to(dtype)  # another system may have brought it to a wider one
        if compiled:
            lay_channels_last(self.pipeline.unet)
            self.pipeline.unet = torch.compile(self.pipeline.unet, **COMPILATION)

    def calls(self, given: Inputs) -> Calls:
        """See :class:`System`."""
        case, pipeline = given.case, self.pipeline
        split = (case.clips, case.frames)
        sample = torch.cat([given.x, given.concat], dim=1).to(self.dtype).unflatten(0, split)
        context = given.context[:: case.frames].to(self.dtype)
        numbers = torch.tensor([[FPS_ID, MOTION, COND_AUG]], device=self.device).to(self.dtype)
        level = torch.tensor(NOISE_LEVEL, device=self.device)
        latents = given.latents[None].to(self.dtype)
        arguments = {
            "encoder_hidden_states": context,
            "added_time_ids": numbers.expand(case.clips, -1),
            "return_dict": False,
        }

        @torch.no_grad()
        def unet() -> Tensor:
            return pipeline.unet(sample, level, **arguments)[0].flatten(0, 1)

        @torch.no_grad()
        def decode() -> Tensor:
            frames = pipeline.decode_latents(latents, case.frames, case.decoding_t)
            return frames[0].transpose(0, 1)

        calls: Calls = {
            "encode": lambda: self._encode(given),
            "unet": unet,
            "decode": decode,
            "video": lambda: self._video(given, latents),
        }
        if "load" in case.stages:
            calls["load"] = self._loading(given.folder)
        return calls

    @torch.no_grad()
    def _encode(self, given: Inputs) -> Any:
        """The first part of the pipeline's call."""
        pipeline = self.pipeline
        context = pipeline._encode_image(given.picture, self.device, 1, True)
        image = pipeline.video_processor.preprocess(
            given.picture, height=given.case.height, width=given.case.width
        ).to(self.device)
        image = image + COND_AUG * torch.randn_like(image)
        if self.dtype == torch.float16:
            pipeline.vae.to(torch.float32)
        latents = pipeline._encode_vae_image(image, self.device, 1, True)
        pipeline.vae.to(self.dtype)
        return context, latents

    def _video(self, given: Inputs, noise: Tensor) -> Tensor:
        case = given.case
        made = self.pipeline(
            given.picture,
            height=case.height,
            width=case.width,
            num_frames=case.frames,
            num_inference_steps=case.steps,
            min_guidance_scale=GUIDANCE[0],
            max_guidance_scale=GUIDANCE[1],
            fps=int(FPS_ID) + 1,
            motion_bucket_id=int(MOTION),
            noise_aug_strength=COND_AUG,
            decode_chunk_size=case.decoding_t,
            generator=torch.Generator().manual_seed(SEED),
            latents=noise,
            output_type="pt",
        )
        return made.frames[0].cpu()

    def _loading(self, folder: Path) -> Callable[[], Any]:
        kind, path = type(self.pipeline), folder / "theirs"
        if not path.exists():
            self.pipeline.save_pretrained(path)

        def load() -> None:
            kind.from_pretrained(path, torch_dtype=self.dtype).to(self.device)

        return load
