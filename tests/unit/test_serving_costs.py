"""Estimates: from counts, from earlier runs, and what to change where memory is short."""

import json
import os
import re
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from sgm.inference.budget import HIGH, LOW
from sgm.inference.estimate import EFFICIENCY
from sgm.inference.options import SamplingOptions
from sgm.inference.settings import ModelFiles, read_config, resolve
from sgm.inference.specs import SPECS
from sgm.serving import costs as module
from sgm.serving.costs import STAGES, Costs
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model of which there are no weights: an estimate needs none."""
    folder = tmp_path_factory.mktemp("files")
    OmegaConf.save(tiny_config(), folder / "svd_tiny.yaml")
    config = read_config(folder / "svd_tiny.yaml")
    return ModelFiles(SPECS["svd_tiny"], folder / "svd_tiny.yaml", config, folder / "absent")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Counts are kept over all tests, as each takes a second."""
    return Costs(tmp_path_factory.mktemp("costs") / "none.jsonl")


@pytest.fixture
def costs(shared, tmp_path):
    costs = Costs(tmp_path / "videos" / "measurements.jsonl")
    costs._counted = shared._counted
    return costs


def settings(files, **options):
    usual = {"num_frames": 4, "num_steps": 10, "device": "cpu", "dtype": "float32"}
    asked = SamplingOptions(**(usual | {"optimize": "exact", "memory": "auto"} | options))
    return resolve(asked, files.config, files.spec, (64, 64))


def seconds(sampling=10.0, decoding=1.0):
    return {"encoding": 0.5, "sampling": sampling, "decoding": decoding, "writing": 0.25}


def test_time_follows_earlier_runs_in_proportion_to_the_work(costs, files):
    # Catches: seconds taken over from another number of steps, frames or guidance halves.
    asked = settings(files)
    costs.note(files, asked, HIGH, seconds(), None)
    same = costs.estimate(files, asked)
    assert same.measured
    assert same.stages == pytest.approx(seconds())
    assert same.seconds == pytest.approx(11.75)
    twice = costs.estimate(files, settings(files, num_steps=20))
    assert twice.stages == pytest.approx(seconds(sampling=20.0))
    unguided = costs.estimate(files, settings(files, guidance_shape="none"))
    assert unguided.stages == pytest.approx(seconds(sampling=5.0))
    longer = costs.estimate(files, settings(files, num_frames=8, decoding_t=4))
    assert longer.stages["sampling"] == pytest.approx(20, rel=0.02)
    assert longer.stages["decoding"] == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("other", [{"dtype": "bfloat16"}, {"optimize": "none"}])
def test_runs_of_another_kind_say_nothing(costs, files, other):
    costs.note(files, settings(files), HIGH, seconds(), None)
    assert not costs.estimate(files, settings(files, **other)).measured


def test_runs_under_another_plan_say_nothing(costs, files):
    costs.note(files, settings(files), LOW, seconds(), None)
    assert not costs.estimate(files, settings(files)).measured


def test_the_most_alike_of_the_last_runs_count(costs, files):
    # Catches: an outlier or an old run that decides, small videos that speak for large ones.
    for sampling in (500.0, *[12.0, 10.0, 11.0, 300.0, 9.0]):
        costs.note(files, settings(files), HIGH, seconds(sampling), None)
    for _ in range(7):
        costs.note(files, settings(files, num_steps=1), HIGH, seconds(50.0), None)
    assert costs.estimate(files, settings(files)).stages["sampling"] == pytest.approx(11.0)


def test_memory_is_corrected_by_what_was_measured(costs, files):
    asked = settings(files)
    counted = costs.estimate(files, asked).bytes
    costs.note(files, asked, HIGH, seconds(), round(1.5 * counted))
    assert costs.estimate(files, asked).bytes == pytest.approx(1.5 * counted, rel=1e-3)


def test_without_runs_the_rate_of_matrix_products_decides(costs, files, monkeypatch):
    monkeypatch.setattr(module, "matmul_rate", lambda *_: 1e9)
    monkeypatch.setattr(costs, "_counted", OrderedDict())
    cost = costs.estimate(files, settings(files))
    network, decoder = module.count_flops(files, settings(files))
    assert not cost.measured
    assert cost.seconds == pytest.approx((network + decoder) / 1e9 / EFFICIENCY)


def test_memory_grows_with_the_video_and_holds_the_weights(costs, files):
    # Catches: activations or weights left out, a model in memory that is counted twice.
    small, long = (costs.estimate(files, settings(files, num_frames=n)) for n in (4, 8))
    weights = costs.weight_bytes(files, settings(files))
    assert weights < small.bytes < long.bytes
    assert 4 * 2.5e6 < weights < 4 * 3.2e6  # of the 3.1 M, one encoder and decoder are not used
    half = settings(files, dtype="bfloat16")
    assert costs.weight_bytes(files, half) == pytest.approx(weights / 2, rel=0.02)
    held = costs.estimate(files, settings(files), held=10**12)
    assert held.free_bytes > 10**12


def test_the_file_of_runs_survives_restarts_and_damage(costs, files):
    # Catches: a page that does not start because of a broken line, a file that grows for ever.
    costs.note(files, settings(files), HIGH, seconds(), None)
    path = costs._path
    (line,) = path.read_text().splitlines()
    broken = ["", "no json", "[]", "{}", json.dumps(json.loads(line) | {"network": 0})]
    path.write_text("\n".join([*broken, line]))
    again = Costs(path)
    again._counted = costs._counted
    assert again.estimate(files, settings(files)).measured
    for _ in range(3):
        again.note(files, settings(files), HIGH, seconds(), None)
    assert len(path.read_text().splitlines()) == 4


def test_the_file_of_runs_is_bounded(costs, files, monkeypatch):
    monkeypatch.setattr(module, "NOTED", 3)
    for sampling in (1.0, 2.0, 3.0, 4.0):
        costs.note(files, settings(files), HIGH, seconds(sampling), None)
    noted = [json.loads(line) for line in costs._path.read_text().splitlines()]
    assert [run["seconds"]["sampling"] for run in noted] == [2.0, 3.0, 4.0]


def test_two_processes_note_in_one_file(costs, files, monkeypatch):
    # Catches: a process that writes its own list over the other's runs, or takes away the file
    # that the other is about to put in place.
    other = Costs(costs._path)
    other._counted = costs._counted
    asked, own = settings(files), os.getpid()

    def note(page, sampling):
        page.note(files, asked, HIGH, seconds(sampling), None)

    def interrupted(path, target):
        monkeypatch.setattr(Path, "replace", replace_file)
        monkeypatch.setattr(os, "getpid", lambda: own + 1)
        note(other, 3.0)
        monkeypatch.undo()
        return path.replace(target)

    replace_file = Path.replace
    assert not other.estimate(files, asked).measured
    for page, sampling in ((costs, 1.0), (other, 2.0)):
        note(page, sampling)
    noted = [json.loads(line) for line in costs._path.read_text().splitlines()]
    assert [run["seconds"]["sampling"] for run in noted] == [1.0, 2.0]
    monkeypatch.setattr(Path, "replace", interrupted)
    note(costs, 4.0)
    assert [path.name for path in costs._path.parent.iterdir()] == [costs._path.name]


def test_what_is_advised_fits_and_a_little_more_does_not(costs, files, monkeypatch):
    # Catches: advice that runs out of memory again, or gives up more than it must.
    asked = settings(files, num_frames=6, height=128, width=128, decoding_t=6)
    needed = costs.estimate(files, asked).bytes
    free = round(0.75 * needed)
    monkeypatch.setattr(module, "free_bytes", lambda _: free)
    told = costs.advice(files, asked)
    found = re.fullmatch(
        r"out of memory: svd_tiny takes about \S+ MB for 6 frames of 128x128, and \S+ MB are "
        r"free; this would fit: decoding_t (\d+), or (\d+) frames, or (\d+)x(\d+)",
        told,
    )
    chunk, frames, height, width = map(int, found.groups())

    def takes(**changes):
        changed = replace(asked, options=asked.options.replace(**changes))
        return costs.estimate(files, changed).bytes

    room = 0.9 * free
    assert takes(decoding_t=chunk) <= room < takes(decoding_t=chunk + 1)
    assert takes(num_frames=frames) <= room < takes(num_frames=frames + 1)
    assert takes(height=height, width=width) <= room
    assert (height, width) == (64, 64)


def test_where_nothing_fits_the_advice_says_so(costs, files, monkeypatch):
    monkeypatch.setattr(module, "free_bytes", lambda _: 1000)
    assert costs.advice(files, settings(files)).endswith("are free; take a smaller model")


def test_every_stage_is_noted(costs, files):
    costs.note(files, settings(files), HIGH, seconds(), None)
    (line,) = Path(costs._path).read_text().splitlines()
    assert list(json.loads(line)["seconds"]) == list(STAGES)
