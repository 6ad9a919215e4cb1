"""Peak memory on CUDA of one way to run at a time, each in a process of its own.

What CUDA's context takes is measured, and counts. A limit is what the process may take in all.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from scripts.bench.presets import Case, Preset
from scripts.bench.processes import ROOT, last_line
from scripts.bench.report import Results, gigabytes, markdown, seconds
from scripts.check_load import make_file
from sgm.inference import SamplingOptions, VideoPipeline
from sgm.inference.options import MEMORY_MODES
from sgm.inference.settings import ModelFiles, find_model

PICTURE = ROOT / "assets" / "sample.jpg"
# diffusers in its least memory: what its page on this model advises, all of it at once.
THEIRS = {"diffusers": 14, "diffusers, offloaded": 2}  # frames decoded at once

Make = Callable[[int], Any]


@dataclass(frozen=True)
class Run:
    """What a process measured.

    Attributes:
        system: the way to run.
        frames: of the video.
        limit: bytes that the process was allowed, or None.
        load_s: seconds until the model was ready.
        video_s: seconds of the video, after one of a single step.
        reserved: most bytes that PyTorch held.
        allocated: most bytes of tensors.
        context: bytes that CUDA itself holds.
        failure: why there are no figures.
    """

    system: str
    frames: int
    limit: int | None = None
    load_s: float | None = None
    video_s: float | None = None
    reserved: int | None = None
    allocated: int | None = None
    context: int | None = None
    failure: str | None = None

    @property
    def peak(self) -> int | None:
        """All that the process took on the device."""
        return None if self.reserved is None else self.reserved + (self.context or 0)


def run(preset: Preset, files: ModelFiles, device: torch.device, results: Results) -> bool:
    """Every way to run at every length, from a file and a folder of the same random weights."""
    if device.type != "cuda":
        raise ValueError(f"--preset memory measures CUDA devices, got {device}")
    runs: list[Run] = []
    with TemporaryDirectory() as temporary:
        file, folder = (Path(temporary, name) for name in ("model.safetensors", "folder"))
        make_file(files.spec.name, file)
        convert = [sys.executable, "-m", "scripts.convert", str(file), str(folder)]
        subprocess.run([*convert, "--to", "diffusers"], check=True, cwd=ROOT)
        for case in preset.cases:
            for system in (*ours(), *THEIRS):
                path = folder if system in THEIRS else file
                runs.append(_in_process(system, files.spec.name, path, case, preset.limit))
                print(runs[-1], flush=True)
                results.add(runs=runs)
    steps = preset.cases[0].steps
    header = ["system", "frames", "peak, context included", "of tensors", f"{steps} steps"]
    results.show(markdown(header, map(_cells, runs)))
    return True


def ours() -> dict[str, dict[str, str]]:
    """This project's ways to run, with the options that they differ in."""
    plain = {"plain": {"optimize": "none", "memory": "high"}}
    return plain | {f"memory {mode}": {"memory": mode} for mode in MEMORY_MODES}


def measure(system: str, model: str, path: Path, case: Case, limit: int | None) -> Run:
    """Load, make a video of one step and then one of all; in this process."""
    torch.zeros(1, device="cuda")
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()
    if limit:
        torch.cuda.set_per_process_memory_fraction(min(1.0, (limit - context) / total))
    began = time.perf_counter()
    if system in THEIRS:
        make = _their_way(system, path, case)
    else:
        make = _our_way(system, model, path, case)
    load_s = time.perf_counter() - began
    make(1)
    began = time.perf_counter()
    make(case.steps)
    video_s = time.perf_counter() - began
    free, total = torch.cuda.mem_get_info()
    context = max(context, total - free - torch.cuda.memory_reserved())  # libraries load late
    return Run(
        *(system, case.frames, limit, load_s, video_s),
        reserved=torch.cuda.max_memory_reserved(),
        allocated=torch.cuda.max_memory_allocated(),
        context=context,
    )


def _in_process(system: str, model: str, path: Path, case: Case, limit: int | None) -> Run:
    job = system, model, str(path), json.dumps(asdict(case)), str(limit or 0)
    try:
        return Run(**json.loads(last_line("scripts.bench.memory", *job)))
    except RuntimeError as error:
        return Run(system, case.frames, limit, failure=str(error))


def _our_way(system: str, model: str, path: Path, case: Case) -> Make:
    given: dict[str, Any] = {"device": "cuda", "dtype": case.dtypes[0], "output": "tensor"}
    given |= {"num_frames": case.frames, "height": case.height, "width": case.width}
    options = SamplingOptions.from_dict(given | ours()[system])
    pipeline = VideoPipeline.load(find_model(model, None, path), options)
    return lambda steps: pipeline(PICTURE, options.replace(num_steps=steps))


def _their_way(system: str, path: Path, case: Case) -> Make:
    from diffusers import StableVideoDiffusionPipeline
    from PIL import Image

    kind: Any = StableVideoDiffusionPipeline
    pipeline = kind.from_pretrained(path, torch_dtype=getattr(torch, case.dtypes[0]))
    if system == "diffusers":
        pipeline.to("cuda")
    else:
        pipeline.enable_model_cpu_offload()
        pipeline.unet.enable_forward_chunking()
    image = Image.open(PICTURE).convert("RGB").resize((case.width, case.height))
    sized = {"height": case.height, "width": case.width, "num_frames": case.frames}
    sized |= {"decode_chunk_size": THEIRS[system]}
    return lambda steps: (
        pipeline(image, num_inference_steps=steps, output_type="pt", **sized).frames[0].cpu()
    )


def _cells(run: Run) -> list[str]:
    return [
        *(run.system, str(run.frames), gigabytes(run.peak) or run.failure or ""),
        *(gigabytes(run.allocated), seconds(run.video_s)),
    ]


def main() -> int:
    """Measure one way to run, and print the figures as JSON."""
    parser = argparse.ArgumentParser()
    for name in ("system", "model", "path", "case", "limit"):
        parser.add_argument(name)
    given = parser.parse_args()
    case = Case(**json.loads(given.case))
    limit = int(given.limit) or None
    found = measure(given.system, given.model, Path(given.path), case, limit)
    print(json.dumps(asdict(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
