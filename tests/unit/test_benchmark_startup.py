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


@pytest.mark.parametrize(
    ("ready", "peak", "met"),
    [(8.0, 6.6, True), (9.5, 6.6, False), (8.0, 6.9, False)],
)
def test_both_targets_count(tmp_path, capsys, ready, peak, met):
    """Catches a mean in the place of the median (one slow run), memory with the imports counted,
    and the wrong system judged: 1.15 times 5 GB above 1 GB of imports is 6.75 GB."""
    ours = [run(ready, peak), run(ready, peak), run(100.0, peak)]
    runs = {"this project": ours, "diffusers": [run(9.0, 50.0)] * 3}
    assert report(runs, 5 * GB, tmp_path / "startup") == met
    assert f"| this project | 1.0 s | 2.0 s | **{ready:.1f} s** |" in capsys.readouterr().out
    figures = json.loads((tmp_path / "startup" / "figures.json").read_text())
    assert figures["medians"]["this project"]["ready"] == ready
    assert "| diffusers |" in (tmp_path / "startup" / "README.md").read_text()


def test_weights_of_every_kind_are_read():
    """Catches a weight left out, and one that has no bytes side by side."""
    layer = nn.Linear(3000, 5000).half()
    scalar = nn.ParameterList([torch.tensor(1.0), torch.ones(4, 6).T])
    assert touch([layer, scalar]) == 3000 * 5000 + 5000 + 1 + 24
