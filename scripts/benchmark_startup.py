"""Measure how long it takes from nothing to a model that is ready to sample.

    python scripts/benchmark_startup.py --out benchmarks/startup

Makes a half-precision svd_xt file of random weights (4.8 GB) and, by ``scripts/convert.py``, a
diffusers folder of the same weights; both are temporary unless named. Then fresh processes load
them in turn, this project's pipeline from the file and diffusers' from its folder, and read every
weight that sampling uses once. Timed from before the process starts, imports included, with the
files in the page cache. Exit code 1 where this project is slower, or needs more memory than its
imports and 1.15 times the file. Linux, 10 GB of disk and of free memory; diffusers is fairest with
accelerate beside it, without which it first draws random weights.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODEL = "svd_xt"
MEMORY_LIMIT = 1.15  # times the file, above what the imports take
CHUNK = 16 << 20  # bytes

Run = dict[str, float]


def start_ours(path: Path) -> Iterator[Any]:
    """Import, and give nothing; load, and give the modules that sampling uses."""
    from sgm.inference.pipeline import VideoPipeline

    yield None
    engine = VideoPipeline.from_spec(MODEL, ckpt_path=path, device="cpu", dtype="float16").engine
    modules = [engine.model, engine.first_stage_model.decoder]
    for embedder in engine.conditioner.embedders:
        autoencoder = getattr(embedder, "encoder", None)  # its decoder is not used
        modules += [autoencoder.encoder, autoencoder.quant_conv] if autoencoder else [embedder]
    yield modules


def start_diffusers(path: Path) -> Iterator[Any]:
    """As :func:`start_ours`."""
    import torch
    from diffusers import StableVideoDiffusionPipeline
    from transformers import CLIPVisionModelWithProjection  # noqa: F401 - loading imports it

    yield None
    kind: Any = StableVideoDiffusionPipeline
    pipeline = kind.from_pretrained(path, torch_dtype=torch.float16)
    yield [pipeline.unet, pipeline.vae, pipeline.image_encoder]


STARTS: dict[str, Callable[[Path], Iterator[Any]]] = {
    "this project": start_ours,
    "diffusers": start_diffusers,
}


def measure(system: str, path: Path) -> Run:
    """Load once in this process: moments on the clock of all processes, and bytes."""
    start = STARTS[system](path)
    next(start)
    imported, imports = time.monotonic(), peak_memory()
    modules = next(start)
    loaded = time.monotonic()
    values = touch(modules)
    return {
        "imported": imported,
        "loaded": loaded,
        "ready": time.monotonic(),
        "processor_s": time.process_time(),
        "imports_bytes": imports,
        "peak_bytes": peak_memory(),
        "values": values,
    }


def touch(modules: list[Any]) -> int:
    """Read every parameter once; return how many values there are."""
    import torch

    scratch = torch.empty(CHUNK, dtype=torch.uint8)
    parameters = [p.detach() for module in modules for p in module.parameters()]
    for parameter in parameters:
        for part in parameter.reshape(-1).view(torch.uint8).split(CHUNK):
            scratch[: len(part)].copy_(part)
    return sum(p.numel() for p in parameters)


def peak_memory() -> int:
    """The largest resident size of this process so far, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def run_once(system: str, path: Path) -> Run:
    """Measure in a fresh process: seconds since its start, and bytes."""
    command = [sys.executable, "-m", "scripts.benchmark_startup", "--once", system, str(path)]
    began = time.monotonic()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=ROOT)
    run: Run = json.loads(done.stdout.splitlines()[-1])
    return run | {moment: run[moment] - began for moment in ("imported", "loaded", "ready")}


def measure_all(paths: dict[str, Path], repeat: int) -> dict[str, list[Run]]:
    """Run the systems in turn, after reading their files into the page cache."""
    from scripts.check_load import reading_time

    files = [file for path in paths.values() for file in (path, *path.rglob("*")) if file.is_file()]
    for file in files:
        reading_time(file)
    runs: dict[str, list[Run]] = {system: [] for system in paths}
    for _ in range(repeat):
        for system, path in paths.items():
            runs[system].append(run_once(system, path))
            print(system, {key: round(value, 2) for key, value in runs[system][-1].items()})
    return runs


def medians(runs: list[Run]) -> Run:
    """The median of every measure."""
    return {key: median(run[key] for run in runs) for key in runs[0]}


def table(rows: dict[str, Run], size: int) -> str:
    """The medians as a Markdown table; sizes in GB (10^9 bytes)."""
    lines = [
        "| | imports | loaded | ready | processor time "
        "| memory of imports | peak memory | above imports / file |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for system, row in rows.items():
        imports, peak = row["imports_bytes"] / 1e9, row["peak_bytes"] / 1e9
        lines.append(
            f"| {system} | {row['imported']:.1f} s | {row['loaded']:.1f} s "
            f"| **{row['ready']:.1f} s** | {row['processor_s']:.1f} s "
            f"| {imports:.2f} GB | {peak:.2f} GB | {(peak - imports) * 1e9 / size:.2f} |"
        )
    return "\n".join(lines)


def describe_machine() -> dict[str, str]:
    """What the times depend on."""
    names = ("torch", "diffusers", "transformers", "accelerate", "safetensors")
    cpus = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in cpus if line.startswith("model name")]
    return {
        "processor": f"{len(models)} x {models[0]}" if models else platform.machine(),
        "python": platform.python_version(),
        **{name: _installed(name) for name in names},
    }


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def make_inputs(file: Path, folder: Path) -> None:
    """Make the file, and the folder from it, where they are absent."""
    from scripts.check_load import make_file

    if not file.exists():
        make_file(MODEL, file)
    if not folder.exists():
        convert = [sys.executable, "-m", "scripts.convert", str(file), str(folder)]
        subprocess.run([*convert, "--to", "diffusers"], check=True, cwd=ROOT)


def report(runs: dict[str, list[Run]], size: int, out: Path | None) -> bool:
    """Print and write the table; return whether both targets are met."""
    rows = {system: medians(each) for system, each in runs.items()}
    ours, theirs = rows.values()
    machine = describe_machine()
    about = ", ".join(f"{name} {value}" for name, value in machine.items() if name != "processor")
    text = (
        f"{table(rows, size)}\n\nFrom the start of the process, medians of "
        f"{len(runs['diffusers'])} alternating runs; a file of {size / 1e9:.2f} GB "
        f"({MODEL}, float16, random values) in the page cache.\n{machine['processor']}; {about}.\n"
    )
    print(text)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        figures = {"machine": machine, "file_bytes": size, "medians": rows, "runs": runs}
        (out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
        (out / "README.md").write_text(f"# Start-up\n\n{text}\n{HOW}")
    above_imports = ours["peak_bytes"] - ours["imports_bytes"]
    return ours["ready"] < theirs["ready"] and above_imports <= MEMORY_LIMIT * size


HOW = """\
Made by `python scripts/benchmark_startup.py --out benchmarks/startup`. "loaded" is when the loading
call returned, "ready" when every weight that sampling uses has been read once: until then, weights
may still lie in the mapped file. Memory is the largest resident size, with pages of mapped files.
"""


def main() -> int:
    """Run the measurement from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--file", type=Path, help="native file, made where absent, kept")
    parser.add_argument("--folder", type=Path, help="diffusers folder of it, made likewise")
    parser.add_argument("--repeat", type=int, default=5, help="processes of each system")
    parser.add_argument("--out", type=Path, help="folder for table and figures")
    parser.add_argument("--once", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.once:
        system, path = arguments.once
        print(json.dumps(measure(system, Path(path))))
        return 0
    if arguments.repeat < 1:
        parser.error(f"--repeat: expected 1 or more, got {arguments.repeat}")
    with TemporaryDirectory() as temporary:
        file = (arguments.file or Path(temporary, f"{MODEL}.safetensors")).resolve()
        folder = (arguments.folder or Path(temporary, MODEL)).resolve()
        try:
            make_inputs(file, folder)
        except ValueError as error:
            parser.error(str(error))
        runs = measure_all({"this project": file, "diffusers": folder}, arguments.repeat)
        return 0 if report(runs, file.stat().st_size, arguments.out) else 1


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
