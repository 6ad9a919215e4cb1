"""The start-up benchmark judges and writes what it measured."""

import json

import pytest
import torch
from torch import nn

from scripts.benchmark_startup import report, touch

GB = 10**9


def run(ready, peak):
    return {
        "imported": 1.0,
        "loaded": 2.0,
        "ready": ready,
        "processor_s": 3.0,
        "imports_bytes": 1 * GB,
        "peak_bytes": peak * GB,
        "values": 10,
    }


MET = {
    "native file": (8.0, 6.6),
    "diffusers folder": (8.7, 6.6),
    "MindSpore file": (9.5, 6.6),
    "native file, optimised networks": (20.0, 50.0),
    "diffusers itself": (9.0, 50.0),
}


@pytest.mark.parametrize(
    "missed",
    [
        {},
        {"diffusers itself": (7.9, 5.0)},
        {"native file": (8.0, 6.9)},
        {"diffusers folder": (8.9, 6.6)},
        {"diffusers folder": (8.7, 6.9)},
        {"MindSpore file": (9.7, 6.6)},
        {"MindSpore file": (9.5, 6.9)},
    ],
)
def test_all_targets_count(tmp_path, capsys, missed):
    """Catches a mean in the place of the median (one slow run), memory with the imports counted,
    and the wrong system judged: 1.15 times 5 GB above 1 GB of imports is 6.75 GB."""
    rows = MET | missed
    runs = {name: [run(*row), run(*row), run(100.0, row[1])] for name, row in rows.items()}
    assert report(runs, 5 * GB, 0.5, tmp_path / "startup") == (not missed)
    ready, _ = rows["native file"]
    assert f"| native file | 1.0 s | 2.0 s | **{ready:.1f} s** |" in capsys.readouterr().out
    figures = json.loads((tmp_path / "startup" / "figures.json").read_text())
    assert figures["medians"]["native file"]["ready"] == ready
    assert "| diffusers itself |" in (tmp_path / "startup" / "README.md").read_text()


def test_weights_of_every_kind_are_read():
    """Catches a weight left out, and one that has no bytes side by side."""
    layer = nn.Linear(3000, 5000).half()
    scalar = nn.ParameterList([torch.tensor(1.0), torch.ones(4, 6).T])
    layer.register_buffer("packed", torch.ones(7))
    layer.register_buffer("opaque", torch.ones(7).to_mkldnn())
    assert touch([layer, scalar]) == 3000 * 5000 + 5000 + 1 + 24 + 7
