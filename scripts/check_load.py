"""Measure what loading a published-size model costs in time and memory.

    python scripts/check_load.py                                a temporary file, deleted at the end
    python scripts/check_load.py --file checkpoints/mine.safetensors    made where absent, and kept

Makes a half-precision file of random weights (4.8 GB for svd_xt). Then, in a fresh process and
imports apart: builds the model on the meta device, loads the file and reads every weight once. The
targets are 1 s + 1.5 times the time of reading the file from the page cache, and a peak memory of
1.15 times the file's size above what the imports take. Exit code 1 where a target is missed.
"""

import argparse
import json
import math
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from sgm.inference.specs import SPECS

if TYPE_CHECKING:
    from torch import nn

CONFIGS = Path(__file__).parents[1] / "configs"
CHUNK = 16 << 20  # bytes
BLOCK = 1 << 25  # random values, repeated
DTYPES = ("float16", "bfloat16", "float32")

# Of CLIP's text side, published files hold these; no model has them.
LEFT_OVERS = {
    "conditioner.embedders.0.open_clip.model.positional_embedding": (77, 1024),
    "conditioner.embedders.0.open_clip.model.text_projection": (1024, 1024),
    "conditioner.embedders.0.open_clip.model.logit_scale": (),
    "conditioner.embedders.0.open_clip.model.token_embedding.weight": (49408, 1024),
    "conditioner.embedders.0.open_clip.model.ln_final.weight": (1024,),
    "conditioner.embedders.0.open_clip.model.ln_final.bias": (1024,),
}


def build(version: str) -> "nn.Module":
    """Build a model of ``configs/`` on the meta device."""
    import torch
    from omegaconf import OmegaConf

    from sgm.util import instantiate_from_config

    config = OmegaConf.load(CONFIGS / f"{version}.yaml").model
    config.params.ckpt_path = None
    with torch.device("meta"):
        model: nn.Module = instantiate_from_config(config)
    return model


def make_file(version: str, path: Path) -> None:
    """Write random half-precision weights of a model, without holding them in memory.

    Raises:
        ValueError: there is no room for them.
    """
    import torch

    from sgm.checkpoint.room import require_room

    shapes = {key: tuple(value.shape) for key, value in build(version).state_dict().items()}
    shapes |= LEFT_OVERS
    size = 2 * sum(math.prod(shape) for shape in shapes.values())
    require_room(path.parent, size + (1 << 30))
    path.parent.mkdir(parents=True, exist_ok=True)
    header, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    block = (0.02 * torch.randn(BLOCK, generator=generator)).half().numpy().tobytes()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _ in range(size // len(block)):
            file.write(block)
        file.write(block[: size % len(block)])


def peak_memory() -> int:
    """The largest resident size of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the parent's memory too
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def import_all(version: str) -> None:
    """Import what the model will need, as the measurement leaves imports out."""
    from omegaconf import OmegaConf

    from sgm.util import get_obj_from_str

    config = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{version}.yaml").model)
    for target in targets(config):
        get_obj_from_str(target)


def targets(node: Any) -> Iterator[str]:
    """Every ``target`` of a configuration."""
    if isinstance(node, Mapping):
        yield from (node["target"],) if "target" in node else ()
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from targets(child)


def touch(model: "nn.Module") -> None:
    """Read every byte of every parameter once, on one thread as `reading_time` does."""
    import torch

    torch.set_num_threads(1)
    scratch = torch.empty(CHUNK, dtype=torch.uint8)
    for parameter in model.parameters():
        for part in parameter.detach().reshape(-1).view(torch.uint8).split(CHUNK):
            scratch[: len(part)].copy_(part)


def reading_time(path: Path) -> float:
    """Seconds to read the file once."""
    buffer = bytearray(CHUNK)
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - start


def measure(version: str, path: Path, dtype: str | None) -> dict[str, float]:
    """Build, load and touch once in this process; seconds and bytes."""
    import torch

    from sgm.checkpoint import load_checkpoint

    import_all(version)
    imports = peak_memory()
    clock = [time.perf_counter()]
    model = build(version)
    clock.append(time.perf_counter())
    load_checkpoint(model, path, dtype=getattr(torch, dtype) if dtype else None)
    clock.append(time.perf_counter())
    touch(model)
    clock.append(time.perf_counter())
    build_s, load_s, touch_s = (end - start for start, end in pairwise(clock))
    peak = peak_memory()
    return {
        "build_s": build_s,
        "load_s": load_s,
        "touch_s": touch_s,
        "total_s": clock[-1] - clock[0],
        "read_s": median(reading_time(path) for _ in range(3)),
        "imports_bytes": imports,
        "peak_bytes": peak,
    }


def report(runs: list[dict[str, float]], size: int) -> bool:
    """Print the medians beside their limits; return whether both targets are met."""
    row = {key: median(run[key] for run in runs) for key in runs[0]}
    time_limit = 1 + 1.5 * row["read_s"]
    memory_limit = 1.15 * size + row["imports_bytes"]
    print(
        f"file         {size / 1e9:6.2f} GB, read in {row['read_s']:.2f} s\n"
        f"build        {row['build_s']:6.2f} s\n"
        f"load         {row['load_s']:6.2f} s\n"
        f"touch        {row['touch_s']:6.2f} s\n"
        f"all          {row['total_s']:6.2f} s   (limit {time_limit:.2f} s)\n"
        f"imports      {row['imports_bytes'] / 1e9:6.2f} GB\n"
        f"peak memory  {row['peak_bytes'] / 1e9:6.2f} GB  (limit {memory_limit / 1e9:.2f} GB)\n"
        f"medians of {len(runs)}"
    )
    return row["total_s"] <= time_limit and row["peak_bytes"] <= memory_limit


def run(arguments: argparse.Namespace, path: Path) -> bool:
    """Make the file where it is absent, and measure in fresh processes."""
    if not path.exists():
        print(f"writing {path}")
        make_file(arguments.version, path)
    reading_time(path)  # warms the page cache
    command = [sys.executable, __file__, "--version", arguments.version, "--file", str(path)]
    command += ["--dtype", arguments.dtype] if arguments.dtype else []
    runs = [
        json.loads(subprocess.run([*command, "--once"], check=True, stdout=subprocess.PIPE).stdout)
        for _ in range(arguments.repeat)
    ]
    return report(runs, path.stat().st_size)


def main() -> int:
    """Run the measurement from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", choices=SPECS, default="svd_xt", help="a model of configs/")
    parser.add_argument("--file", type=Path, help="kept; default: a temporary file")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="convert to this type; the targets are for no conversion"
    )
    parser.add_argument("--repeat", type=int, default=3, help="processes to measure")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.repeat < 1:
        parser.error(f"--repeat: expected 1 or more, got {arguments.repeat}")
    if arguments.once:
        print(json.dumps(measure(arguments.version, arguments.file, arguments.dtype)))
        return 0
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = arguments.file or Path(folder) / f"{arguments.version}.safetensors"
            return 0 if run(arguments, file) else 1
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
