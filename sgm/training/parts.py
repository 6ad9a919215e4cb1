"""A run's state without its optimiser, to move a run between machines in small files.

They hold, in half precision, what is enough to go on: the trained weights, their average, the step.
The optimiser starts anew, with a warm-up.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sgm.training import snapshot

LIMIT = 15_000_000
"""Bytes of tensors in a file."""


def pack(out: Path, folder: Path, limit: int = LIMIT) -> None:
    """Write the states of all stages under ``out`` as files of at most ``limit`` bytes of tensors.

    Args:
        out: folder of the stages.
        folder: where the files go, in a folder for each stage.
        limit: size of a file; a tensor that is larger has a file to itself.
    """
    for file in sorted(out.glob("*/state.pt")):
        state = snapshot.load(file)
        progress = {key: state[key] for key in ("step", "seconds", "notes")}
        progress["updates"] = int(state["ema"].pop("updates"))
        tensors = {f"ema.{key}": value.half() for key, value in state["ema"].items()}
        tensors |= {f"model.{key}": state["model"][key].half() for key in state["ema"]}
        target = folder / file.parent.name
        target.mkdir(parents=True, exist_ok=True)
        for number, part in enumerate(_split(tensors, limit)):
            metadata = {"progress": json.dumps(progress)}
            save_file(part, target / f"part-{number:02d}.safetensors", metadata)


def unpack(folder: Path, out: Path) -> None:
    """Make states of what `pack` wrote, for the stages that have none under ``out``.

    Raises:
        ValueError: the parts in a folder are of different states.
    """
    for source in sorted(path for path in folder.iterdir() if path.is_dir()):
        target = out / source.name / "state.pt"
        if not target.exists():
            snapshot.save_atomically(_read(source), target)


def _split(tensors: Mapping[str, Tensor], limit: int) -> Iterator[dict[str, Tensor]]:
    part: dict[str, Tensor] = {}
    size = 0
    for key, tensor in tensors.items():
        if part and size + tensor.nbytes > limit:
            yield part
            part, size = {}, 0
        part[key] = tensor.contiguous()
        size += tensor.nbytes
    yield part


def _read(folder: Path) -> dict[str, Any]:
    halves: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}}
    progress = set()
    for path in sorted(folder.glob("part-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            progress.add(file.metadata()["progress"])
            for name in file.keys():  # noqa: SIM118 - the file is no mapping
                kind, key = name.split(".", 1)
                halves[kind][key] = file.get_tensor(name).float()
    if len(progress) != 1 or halves["model"].keys() != halves["ema"].keys():
        raise ValueError(f"expected the parts of one state in {folder}, all of them and no others")
    state = json.loads(progress.pop())
    updates = state.pop("updates")
    return state | halves | {"ema": halves["ema"] | {"updates": updates}}
