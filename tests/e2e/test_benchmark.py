"""The benchmark measures what it says: equal work, wrong results seen, nothing lost on the way."""

import inspect
import json
import weakref
from dataclasses import asdict
from functools import partial
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from scripts.bench import floor, growth, memory, processes, theirs, training
from scripts.bench.charts import Curve, bars, curves
from scripts.bench.compare import Row, relative_error, table, verdicts
from scripts.bench.floor import count, operations_of
from scripts.bench.inputs import inputs_of
from scripts.bench.models import build_engine, model_files
from scripts.bench.presets import DIFFUSERS, PRESETS, Case, Target, small
from scripts.bench.report import markdown, seconds, slug
from scripts.bench.systems import make_system
from scripts.bench.timing import alternate
from scripts.benchmark import main
from scripts.check_load import make_file
from sgm.device import full_float32
from sgm.inference import SamplingOptions

CPU = torch.device("cpu")
ROUNDING = 1e-4  # float32 in another order, through a random network


@pytest.fixture(autouse=True)
def one_thread():
    """Other tests may run beside these, and threads that wait for each other are slow then."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def few_products(monkeypatch):
    """How quick the machine is at its best takes seconds to find, and is not looked at here."""
    monkeypatch.setattr(floor, "RATE_TRIES", 1)
    monkeypatch.setattr(floor, "PACKED_TRIES", 2)


@pytest.fixture(scope="module")
def preset():
    return small(PRESETS["tiny"])


@pytest.fixture(scope="module")
def files(preset):
    return model_files(preset)


@pytest.fixture(scope="module")
def engine(files):
    return build_engine(files, CPU, torch.float32)


def figures(folder, name):
    (path,) = folder.glob(f"{name}-*.json")
    return json.loads(path.read_text()), path


# ---------------------------------------------------------------- the systems do equal work
@pytest.mark.parametrize("clips", [1, 2])
def test_systems_give_the_same_and_a_wrong_weight_shows(files, engine, preset, clips):
    """Catches: rows of the clips in another order, other conditioning, another noise level; and an
    error column that would not see them. The tensors are shared: full width fits twice at most."""
    case = Case(3, 64, 96, {}, clips=clips, steps=2)
    plain, ours, theirs = (
        make_system(name, files, engine, CPU, torch.float32)
        for name in ("none", "exact", DIFFUSERS)
    )
    weight = theirs.pipeline.unet.conv_in.weight
    own = engine.model.diffusion_model.input_blocks[0][0].weight
    assert weight.data_ptr() == own.data_ptr()
    with inputs_of(files, engine, case, CPU) as given:
        expected = plain.calls(given)
        for system in (ours, theirs):
            calls = system.calls(given)
            for stage in ("unet", "decode"):
                assert relative_error(calls[stage](), expected[stage]()) < ROUNDING
        wrong = weight.clone()
        wrong[0, 0, 0, 0] += 1
        theirs.pipeline.unet.conv_in.weight = nn.Parameter(wrong, requires_grad=False)
        error = relative_error(theirs.calls(given)["unet"](), expected["unet"]())
        assert error > 10 * ROUNDING


def test_weights_are_the_same_in_every_type(files, engine):
    """Catches: another draw for each type, in which errors would be differences of weights."""
    half = build_engine(files, CPU, torch.bfloat16).state_dict()
    for key, value in engine.state_dict().items():
        assert torch.equal(half[key], value.bfloat16())


def test_training_loops_take_the_same_steps(files):
    """Catches: another loss, preconditioning, condition or optimiser in one of the two loops."""
    case = Case(3, 64, 64, {}, clips=2)
    ours, theirs = (make(files, case, CPU, True) for make in training.LOOPS.values())
    losses = [ours() for _ in range(3)]
    assert [theirs() for _ in range(3)] == pytest.approx(losses, rel=ROUNDING)
    again = training.our_loop(files, case, CPU, False)
    assert [again() for _ in range(3)] == pytest.approx(losses, rel=ROUNDING)


def test_the_reference_is_computed_as_everything_else_but_for_its_bits():
    """Catches: cuDNN switched off, or its choices changed, where only TF32 is unwanted."""
    cudnn = torch.backends.cudnn
    with cudnn.flags(enabled=True, benchmark=True, deterministic=True, allow_tf32=True):
        with full_float32():
            assert (cudnn.enabled, cudnn.benchmark, cudnn.deterministic) == (True, True, True)
            assert not cudnn.allow_tf32
        assert cudnn.allow_tf32


def test_diffusers_is_compiled_for_each_length(monkeypatch, files, engine):
    """Catches: one graph with a symbolic length for the second case, slower than it has to be."""
    compiled, sizes = torch.compile, []

    def keep(graph, inputs):
        sizes.extend(
            size for each in inputs if isinstance(each, torch.Tensor) for size in each.shape
        )
        sizes.extend(each for each in inputs if not isinstance(each, torch.Tensor))
        return graph.forward

    def compile_without_code(module, mode, **options):
        assert mode == "reduce-overhead"
        return compiled(module, backend=keep, **options)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", compile_without_code)
    network = nn.Conv2d(4, 4, 3)
    monkeypatch.setattr(
        theirs, "build_diffusers", lambda *_: SimpleNamespace(unet=network, vae=network)
    )
    system = theirs.Diffusers(files, engine, CPU, torch.float32, compiled=True)
    for frames in (5, 3):
        system.pipeline.unet(torch.zeros(frames, 4, 8, 8))
    torch._dynamo.reset()
    assert {type(size) for size in sizes} == {int}
    assert {3, 5} <= set(sizes)


# ---------------------------------------------------------------- floor
def test_floor_of_a_layer_by_hand():
    """Catches: a multiplication and its addition as one operation."""
    layer, x = nn.Linear(7, 5, device="meta"), torch.empty(3, 7, device="meta")
    assert sum(operations_of(lambda: layer(x)).values()) == 2 * 3 * 7 * 5


def test_floor_of_the_networks(files):
    """Catches: rows taken for clips, steps forgotten, savings that save no arithmetic."""
    one, two = (count(files, Case(4, 64, 64, {}, clips=clips, steps=3)) for clips in (1, 2))
    for before, after in zip(
        (one["unet"].plain, one["unet"].exact), (two["unet"].plain, two["unet"].exact), strict=True
    ):
        assert after == pytest.approx(2 * before, rel=0.02)  # all but the embeddings
    assert one["decode"].exact == two["decode"].exact
    assert two["unet"].exact < two["unet"].plain
    assert two["decode"].exact < two["decode"].plain
    assert two["video"].exact == 3 * two["unet"].exact + two["decode"].exact
    assert sum(two["video"].operations.values()) == two["video"].exact


@pytest.mark.slow
def test_floor_at_full_width():
    """The counts of the published sizes, made by another program."""
    case = Case(25, 576, 1024, {}, steps=25)
    found = count(model_files(PRESETS["gpu"]), case)
    assert found["unet"].plain == pytest.approx(159.9e12, rel=1e-3)
    assert found["decode"].plain == pytest.approx(173.6e12, rel=1e-3)
    assert found["video"].exact == pytest.approx(3896e12, rel=2e-3)


# ---------------------------------------------------------------- timing, targets
def test_calls_alternate_and_a_failure_stays_alone():
    """Catches: one system measured after the other, a crash that takes all figures with it."""
    order = []

    def broken():
        order.append("broken")
        raise RuntimeError("no such kernel\nand a long story")

    calls = {"a": lambda: order.append("a"), "broken": broken, "b": lambda: order.append("b")}
    timing = alternate(calls, CPU, repeat=2, warmup=1)
    assert order == ["a", "broken", "b", "a", "b", "a", "b"]
    assert timing["broken"].failure == "RuntimeError: no such kernel"
    assert timing["broken"].median is None
    assert len(timing["a"].seconds) == len(timing["b"].seconds) == 2


def row(system, median, stage="unet", dtype="float32", **more):
    times = (median, 2 * median) if median else ()
    return Row("4 frames", stage, dtype, system, times, median, **more)


def test_targets():
    """Catches: a ratio the other way round, a missing figure that counts as met."""
    rows = [row("exact", 2.0), row(DIFFUSERS, 3.0), row("exact", 1.5, dtype="bfloat16")]
    wanted = [
        Target("4 frames", "unet", "float32", 1.5),
        Target("4 frames", "unet", "float32", 1.6),
        Target("4 frames", "unet", "bfloat16", 1.3, ("exact", "float32")),
        Target("4 frames", "decode", "float32", 1.0),
        Target("4 frames", "unet", "bfloat16", 1.4, ("exact", "float32"), "amx_bf16"),
    ]
    came = verdicts(wanted, rows, ["avx2"])
    assert [each["met"] for each in came] == [True, False, True, False, False]
    assert [each["asked"] for each in came] == [True, True, True, True, False]
    assert came[0]["came"] == 1.5
    assert came[3]["came"] is None


def test_expected_growth():
    """Catches: a law that is fitted to the smallest point, where overheads are."""
    points = [
        growth.Point("frames", "unet", value, (took,), took, None, flops, None, None)
        for value, took, flops in ((1, 5.0, 10.0), (4, 8.0, 40.0))
    ]
    assert [point.expected for point in growth.with_law(points)] == [2.0, 8.0]


# ---------------------------------------------------------------- tables, charts
def test_table():
    """Catches: the ratio of another case, and a failure without a word."""
    rows = [
        row("exact", 0.002, share=0.5, error=1e-6, working_bytes=3 * 10**9),
        row(DIFFUSERS, 0.003),
        row("none", None, failure="OutOfMemoryError"),
    ]
    header, rule, ours, theirs, failed = table(rows).splitlines()
    assert header.count("|") == rule.count("|") == ours.count("|") == failed.count("|")
    for cell in ("**2 ms**", "2 ms to 4 ms", "1.50", "50%", "1.0e-06", "3.00 GB"):
        assert f" {cell} " in ours
    assert "| diffusers | **3 ms** |" in theirs
    assert "OutOfMemoryError" in failed


def test_units():
    assert [seconds(x) for x in (12.345, 0.0123, 0.0000456)] == ["12.3 s", "12.3 ms", "45.6 us"]
    assert slug("NVIDIA H100 80GB (PCIe)") == "nvidia-h100-80gb-pcie"
    assert markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |"


def test_charts():
    """Catches: pictures that are no XML, bars that are not as long as their values."""
    root = ElementTree.fromstring(bars({"a < b": {"one": 1.0, "two": 4.0}}))
    boxes = [each for each in root if each.tag.endswith("rect") and "x" in each.attrib]
    one, two = (float(each.attrib["width"]) for each in boxes)
    assert two == pytest.approx(4 * one, rel=1e-3)
    root = ElementTree.fromstring(curves([Curve("t", "n", [1, 10], [1.0, 10.0], [1.0, 20.0])]))
    dots = [each for each in root if each.tag.endswith("circle")]
    assert len(dots) == 2
    left, right = dots
    assert float(left.attrib["cx"]) < float(right.attrib["cx"])
    assert float(left.attrib["cy"]) > float(right.attrib["cy"])  # up is more


# ---------------------------------------------------------------- the command
def test_everything_is_written(tmp_path):
    """Catches: a stage or a system that is lost, figures without what they depend on."""
    assert main(["--preset", "tiny", "--small", "--device", "cpu", "--out", str(tmp_path)]) == 0
    found, path = figures(tmp_path, "tiny")
    known = {"device", "processor_flags", "threads", "load", "python", "torch", "diffusers"}
    assert known <= found["machine"].keys()
    assert found["rates"]["float32"] > 0
    systems = {}
    for each in found["rows"]:
        assert each["failure"] is None, each
        assert len(each["seconds"]) == 1
        if each["system"] != "reference":
            systems.setdefault(each["stage"], []).append(each["system"])
        if each["error"] is not None:
            assert each["error"] < ROUNDING
            assert each["share"] > 0
    all_three = ["none", "exact", DIFFUSERS]
    assert systems.keys() == PRESETS["tiny"].cases[0].stages.keys()
    assert systems.pop("write") == all_three[:2]
    assert systems.pop("condition") == all_three[1:2]
    assert all(names == all_three for names in systems.values())
    page = path.with_suffix(".md").read_text()
    assert page.count("\n| ") == len(found["rows"]) + 2
    assert ElementTree.parse(path.with_suffix(".svg"))


def test_savings_are_pairs_of_equals(tmp_path):
    """Catches: a plain and an optimised form that do not compute the same."""
    assert main(["--preset", "savings", "--small", "--out", str(tmp_path), "--repeat", "1"]) == 0
    found, _ = figures(tmp_path, "savings")
    letters = [each["letter"] for each in found["savings"]]
    assert set("ABCDEFGHIJLMO") <= set(letters)
    for each in found["savings"]:
        assert each["error"] < 1e-5, each
        assert each["ratio"] > 0


@pytest.mark.parametrize("flag", ["--kernels", "--profile"])
def test_sections(tmp_path, flag):
    """Catches: a function or a kind of operation that is left out."""
    asked = ["--preset", "tiny", "--small", "--device", "cpu", "--out", str(tmp_path)]
    assert main([*asked, flag]) == 0
    found, _ = figures(tmp_path, "tiny")
    if flag == "--kernels":
        assert len({each["name"] for each in found["kernels"]}) == 6
        assert all(each["rate"] > 0 for each in found["kernels"])
    else:
        gaps = found["profile"]["unet"]
        assert {each["kind"] for each in gaps if each["seconds"] > 0} >= {"product", "convolution"}
        assert [each["gap"] for each in gaps] == sorted((g["gap"] for g in gaps), reverse=True)


def test_growth(tmp_path):
    asked = ["--preset", "growth", "--small", "--device", "cpu", "--out", str(tmp_path)]
    assert main([*asked, "--repeat", "1"]) == 0
    found, path = figures(tmp_path, "growth")
    axes = {(each["axis"], each["stage"]) for each in found["points"]}
    assert axes == {
        *((axis, stage) for axis in ("frames", "side") for stage in ("unet", "decode")),
        ("steps", "video"),
    }
    assert all(each["median"] and each["expected"] for each in found["points"])
    assert ElementTree.parse(path.with_suffix(".svg"))


def test_refusals(capsys, tmp_path):
    """Catches: a traceback, and files of a run that did not happen."""
    asked = ["--preset", "memory", "--device", "cpu", "--out", str(tmp_path)]
    assert main(asked) == 2
    assert capsys.readouterr().err == "error: --preset memory measures CUDA devices, got cpu\n"
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        main(["--repeat", "0"])
    assert "--repeat: expected more than 0, got 0" in capsys.readouterr().err


def test_what_another_process_is_told():
    """Catches: options that there are not, a case that does not come back from JSON."""
    for options in memory.ours().values():
        SamplingOptions.from_dict(options)
    case = PRESETS["memory"].cases[0]
    assert Case(**json.loads(json.dumps(asdict(case)))) == Case(
        **asdict(case) | {"dtypes": ["float16"]}
    )


def test_our_way_is_planned_for_its_own_video(monkeypatch, tmp_path):
    """Catches: the longest video's memory plan in every row, a model's file taken for svd_xt's."""
    path, seen = tmp_path / "model.safetensors", []

    def load(files, options):
        seen.append((files.spec.name, options))
        return lambda _, options: seen.append(("video", options))

    make_file("svd_tiny", path)
    monkeypatch.setattr(memory, "VideoPipeline", SimpleNamespace(load=load))
    case = Case(14, 320, 512, {}, ("float16",))
    memory._our_way("memory auto", "svd_tiny", path, case)(3)
    (model, loaded), (_, video) = seen
    assert model == "svd_tiny"
    assert (loaded.num_frames, loaded.height, loaded.width) == (14, 320, 512)
    assert video == loaded.replace(num_steps=3)


def test_another_process_is_told_the_model(monkeypatch, capsys, tmp_path):
    """Catches: a figure of the command line that is read as another."""
    case, seen = Case(14, 320, 512, {}, ("float16",)), []

    def measure(system, model, path, case, limit):
        seen.append((system, model, path, case.frames, limit))
        return memory.Run(system, case.frames, limit, video_s=1.0)

    def in_this_process(module, *arguments):
        assert module == "scripts.bench.memory"
        monkeypatch.setattr("sys.argv", [module, *arguments])
        assert memory.main() == 0
        return capsys.readouterr().out

    monkeypatch.setattr(memory, "measure", measure)
    monkeypatch.setattr(memory, "last_line", in_this_process)
    run = memory._in_process("memory auto", "svd_tiny", tmp_path, case, 10**10)
    assert run == memory.Run("memory auto", 14, 10**10, video_s=1.0)
    assert seen == [("memory auto", "svd_tiny", tmp_path, 14, 10**10)]


def test_a_process_that_fails_says_why():
    """Catches: CalledProcessError, and a traceback instead of its last line."""
    assert processes.last_line("platform").startswith(("Linux", "macOS", "Windows"))
    with pytest.raises(RuntimeError, match=r"^[^\n]*No module named scripts.no_such$"):
        processes.last_line("scripts.no_such")


def test_peaks_are_measured_on_an_empty_device(monkeypatch, capsys, tmp_path):
    """Catches: weights and moments of both loops that stay while a third is measured; a loop out
    of memory that ends the whole run."""
    alive, emptied = [], []

    def empty_cache():
        emptied.append(not [each for each in alive if each() is not None])

    def watched(make, *given):
        step = make(*given)
        step.itself = step  # only the garbage collector finds such a circle
        alive.extend(map(weakref.ref, inspect.getclosurevars(step).nonlocals["parameters"]))
        return step

    def last_line(module, job):
        assert module == "scripts.bench.training"
        assert alive
        assert emptied[-1]
        if json.loads(job)["system"] == DIFFUSERS:
            raise RuntimeError("torch.OutOfMemoryError: CUDA out of memory.")
        return "1000000000"

    loops = {name: partial(watched, make) for name, make in training.LOOPS.items()}
    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    monkeypatch.setattr(training, "LOOPS", loops)
    monkeypatch.setattr(training, "last_line", last_line)
    asked = ["--preset", "training", "--small", "--device", "cpu", "--out", str(tmp_path)]
    assert main(asked) == 1  # nothing to compare with
    found, _ = figures(tmp_path, "training")
    assert len(found["training"]) == 4
    for each in found["training"]:
        assert each["median"] > 0
        fails = each["system"] == DIFFUSERS
        assert each["peak_bytes"] == (None if fails else 10**9)
        assert bool(each["failure"]) == fails
    assert capsys.readouterr().out.count("| torch.OutOfMemoryError: CUDA out of memory. |") == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_gpu(tmp_path):
    """Every part of the GPU's preset, compiled diffusers included, at a size of seconds."""
    asked = ["--preset", "gpu", "--small", "--device", "cuda", "--out", str(tmp_path)]
    assert main(asked) == 0
    found, _ = figures(tmp_path, "gpu")
    assert not [each for each in found["rows"] if each["failure"]]
    assert all(each["error"] is None or each["error"] < 0.1 for each in found["rows"])
    for flag in ("--kernels", "--profile"):
        assert main([*asked, flag]) == 0
