"""The command line, mostly in process: `main` gives the exit code of the program."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from scripts.sampling.simple_video_sample import main, parse
from sgm.inference import videos
from sgm.inference.batch import plan_job
from sgm.inference.flags import FORMATS
from tests.tiny import tiny_config, write_tiny_checkpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture
def place(tmp_path, monkeypatch, weights):
    """A working directory with a model under a name of the table, and two pictures."""
    for folder in ("checkpoints", "configs", "photos"):
        (tmp_path / folder).mkdir()
    (tmp_path / "checkpoints" / "svd_tiny.safetensors").symlink_to(weights)
    OmegaConf.save(tiny_config(), tmp_path / "configs" / "svd_tiny.yaml")
    noise = np.random.default_rng(0).integers(0, 255, (2, 60, 90, 3), dtype=np.uint8)
    Image.fromarray(noise[0]).save(tmp_path / "photos" / "a.png")
    Image.fromarray(noise[1]).save(tmp_path / "photos" / "b.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SGM_CACHE", str(tmp_path / "cache"))
    return tmp_path


def sample(*arguments, out="out"):
    """The cheapest run: one step, two frames."""
    quick = ["--version=svd_tiny", "--num_frames=2", "--num_steps=1", f"--output_folder={out}"]
    asked = {argument.split("=")[0] for argument in arguments}
    return main([*(q for q in quick if q.split("=")[0] not in asked), *arguments])


def names(folder="out"):
    return sorted(path.name for path in Path(folder).iterdir())


def frames(path):
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def record(path):
    return json.loads(Path(path).read_text())


# What answers before anything is loaded


def python(code, *arguments):
    """Run in a fresh interpreter; gives its result and the processor time it took."""
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    after = os.times()
    seconds = after.children_user - before.children_user
    return done, seconds + after.children_system - before.children_system


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--help"], 0, "--motion_bucket_id"),
        (["--motion_bucket", "3"], 2, "unknown flag --motion_bucket; did you mean"),
        (["--num_steps=0"], 2, "num_steps must be an integer from 1 to 1000"),
    ],
)
def test_help_and_wrong_arguments_answer_within_two_seconds(arguments, code, words):
    """Caught: torch or fire's own help imported first; a traceback; exit code 0 for an error."""
    program = (
        "import sys; from scripts.sampling.simple_video_sample import main; "
        "code = main(sys.argv[1:]); print('torch' in sys.modules); sys.exit(code)"
    )
    done, seconds = python(program, *arguments)
    assert done.returncode == code
    assert words in (done.stdout if code == 0 else done.stderr)
    assert done.stdout.endswith("False\n")
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == (code != 0)
    assert seconds < 2


def test_the_script_itself_exits_with_the_code():
    script = ROOT / "scripts" / "sampling" / "simple_video_sample.py"
    command, paths = [sys.executable, script, "--nosuch"], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=paths)
    assert done.returncode == 2
    assert done.stderr == "error: unknown flag --nosuch; see --help\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sampling_steps=3"], "unknown flag --sampling_steps"),
        (["-s", "3"], "unknown flag -s"),
        (["--seed=1", "--seed=2"], "--seed is given twice"),
        (["--num_frames"], "--num_frames needs a value"),
        (["--seed=soon"], "seed must be an integer from 0 to 2^63 - 1, got 'soon'"),
        (["--seed=1.5"], "seed must be an integer"),
        (["--cond_aug=nan"], "cond_aug must be a number from 0 to 10, got nan"),
        (["--resume", "photos"], "--resume is a switch"),
        (["--version=svd3"], "version must be one of svd_xt, svd,"),
        (["--version=svd"], "svd needs its weights at checkpoints/svd.safetensors"),
        (["--ckpt_path=photos/a.png"], "expected a checkpoint ending in"),
        (["--config=absent.yaml", "--version=svd_tiny"], "config 'absent.yaml': no such file"),
        (["--input_path=absent.jpg"], "input 'absent.jpg': no such file"),
        (["photos/a.png", "absent.jpg"], "input 'absent.jpg': no such file"),
        (["--repeat=absent.json"], "record 'absent.json': No such file"),
        (["--repeat=configs/svd_tiny.yaml"], "not the JSON of a video made here"),
        (["--format=avi"], "format must be one of mp4, gif, webp, png, got 'avi'"),
        (["--height=65"], "mp4 needs an even height and width, got 65x64; the nearest is 64x64"),
        (["--azimuths_deg=1,2"], "azimuths_deg must hold 4 angles, got 2"),
        (["--device=tpu"], "device 'tpu' is not available here"),
        (["--device=meta"], "device 'meta' is not available here"),
        (["--output=latents"], "unknown flag --output"),
        (["--output_folder=photos/a.png"], "'photos/a.png': expected a folder, but this is a file"),
        (["--output_folder=~nosuchuser/x"], "there is no home folder ~nosuchuser"),
        (["--repeat=~nosuchuser/x.json"], "there is no home folder ~nosuchuser"),
        (["--input_path=" + ",".join(["absent.jpg"] * 40)], "input 'absent.jpg': no such file"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(place, capsys, arguments, words):
    before = sorted(place.rglob("*"))
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert words in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert sorted(place.rglob("*")) == before


def test_a_misfit_checkpoint_is_one_line_and_not_blamed_on_the_pictures(place, capsys):
    """Caught: an error of loading reported for each picture, with exit code 1."""
    Image.new("RGB", (8, 8)).save(place / "weights.png")
    assert sample("photos", "--ckpt_path=weights.png") == 2
    assert capsys.readouterr().err.count("error: ") == 1


def test_verbose_shows_where_an_error_arose(place, capsys):
    assert main(["--num_steps=0", "--verbose"]) == 2
    assert "Traceback" in capsys.readouterr().err


# What is made


def test_bare_run_takes_the_bundled_picture_and_the_first_model_present(place, capsys):
    assert main([]) == 0
    printed = capsys.readouterr()
    assert (
        printed.err
        == f"{ROOT / 'assets' / 'sample.jpg'}, with svd_tiny (14 frames of 64x64, bundled)\n"
    )
    path, of, picture, seconds = printed.out.split(maxsplit=3)
    assert (of, picture) == ("of", f"{ROOT / 'assets' / 'sample.jpg'},")
    assert path == "outputs/simple_video_sample/svd_tiny/000000.mp4"
    assert float(seconds.removesuffix(" s\n")) > 0
    assert frames(path).shape == (4, 64, 64, 3)


def test_a_folder_with_bad_files_gives_the_others_and_exit_code_1(place, capsys):
    whole = (place / "photos" / "a.png").read_bytes()
    (place / "photos" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (place / "photos" / "text.png").write_text("not a picture")
    assert sample("photos") == 1
    printed = capsys.readouterr()
    assert [line.split("/")[-1].split("'")[0] for line in printed.err.splitlines()[-2:]] == [
        "cut.png",
        "text.png",
    ]
    assert names() == ["000000.json", "000000.mp4", "000001.json", "000001.mp4"]
    inputs = [
        Path(record(f"out/{name}.json")["input"]["path"]).name for name in ("000000", "000001")
    ]
    assert inputs == ["a.png", "b.png"]


@pytest.mark.parametrize(
    "inputs",
    [
        ["--input_path", "photos/a.png,photos/b.png"],
        ["--input_path", "['photos/a.png', 'photos/b.png']"],
        ["--input_path", "photos/a.png", "photos/b.png"],
        ["photos/*.png"],
    ],
)
def test_several_inputs(place, inputs):
    job = plan_job(parse(["--version=svd_tiny", *inputs]))
    assert [str(path) for path in job.inputs] == ["photos/a.png", "photos/b.png"]


def test_a_name_that_looks_like_something_else_is_a_name(place):
    """Caught: fire's guess of types, which makes 2024 an integer and cuts at the #."""
    content = (place / "photos" / "a.png").read_bytes()
    for name in ("2024", "1e3", "a #1.png", "one, two.png", "-5"):
        (place / name).write_bytes(content)
        job = plan_job(parse([f"--input_path={name}", "--version=svd_tiny", "--seed=1e1"]))
        assert [str(path) for path in job.inputs] == [name]
        assert job.settings.options.seed == 10


def test_a_name_with_a_newline_stays_in_its_line(place, capsys):
    (place / "photos" / "a.png").rename(place / "new\nline.png")
    assert sample("new\nline.png") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("out/000000.mp4  of new\\nline.png, ")


def test_numbers_go_on_and_nothing_is_replaced(place):
    (place / "out").mkdir()
    (place / "out" / "000004.gif").write_bytes(b"kept")
    for format in FORMATS:
        assert sample("photos/a.png", f"--format={format}") == 0
    assert names() == [
        "000004.gif",
        *("000005.json", "000005.mp4", "000006.gif", "000006.json"),
        *("000007.json", "000007.webp", "000008", "000008.json"),
    ]
    assert (place / "out" / "000004.gif").read_bytes() == b"kept"
    assert frames("out/000005.mp4").shape == (2, 64, 64, 3)
    for name in ("000006.gif", "000007.webp"):
        with Image.open(Path("out") / name) as animation:
            assert animation.n_frames == 2
    assert names("out/000008") == ["000000.png", "000001.png"]


def test_the_formats_of_the_flag_are_those_that_can_be_written():
    assert set(FORMATS) == set(videos.WRITERS)


def test_a_record_says_everything(place, weights):
    assert sample("photos/a.png", "--seed=5", "--fps=12") == 0
    made = record("out/000000.json")
    undecided = {name for name, value in made["options"].items() if value is None}
    assert undecided == {  # the YAML's sampler and guidance, in sampler_config; and SV3D's
        *("sampler", "guidance_shape", "min_guidance", "max_guidance"),
        *("elevations_deg", "azimuths_deg", "image_frame_ratio"),
        *("lora", "safety_filter"),
    }
    assert made["options"]["seed"] == 5
    assert made["options"]["fps_id"] == 11
    assert made["sampler_config"]["params"]["guider_config"]["params"]["max_scale"] == 2.5
    for name, path in {"input": "photos/a.png", "checkpoint": weights}.items():
        command = ["sha256sum", str(path)]
        digest = subprocess.run(command, capture_output=True, text=True, check=True).stdout[:64]
        assert made[name]["sha256"] == digest
    assert set(made["made_with"]) == {"sgm", "torch", "python", "device"}
    assert made["video"] == "000000.mp4"


def test_repeat_makes_the_same_video_bit_for_bit(place):
    """Caught: an option that the record lacks; a default taken anew; another seed."""
    flags = ["--seed=9", "--motion_bucket_id=200", "--sampler=euler_ancestral", "--max_guidance=4"]
    assert sample("photos/b.png", "--height=70", "--videos_per_image=2", *flags) == 0
    assert main(["--repeat=out/000001.json", "--output_folder=again"]) == 0
    assert names("again") == ["000000.json", "000000.mp4"]
    again = Path("again/000000.mp4").read_bytes()
    assert again == Path("out/000001.mp4").read_bytes()
    assert again != Path("out/000000.mp4").read_bytes()


def test_repeat_with_flags_beside(place):
    assert sample("photos/a.png", "--seed=9") == 0
    flags = ["--fps=12", "--input_path=photos/b.png", "--format=gif"]
    assert main(["--repeat=out/000000.json", "--output_folder=again", *flags]) == 0
    first, second = record("out/000000.json"), record("again/000000.json")
    changed = {k for k in first["options"] if first["options"][k] != second["options"][k]}
    assert changed == {"fps", "fps_id"}
    assert second["format"] == "gif"
    assert second["input"]["path"].endswith("b.png")


def test_repeat_refuses_an_input_that_has_changed(place, capsys):
    assert sample("photos/a.png") == 0
    (place / "photos" / "a.png").write_bytes((place / "photos" / "b.png").read_bytes())
    assert main(["--repeat=out/000000.json"]) == 2
    assert "a.png is no longer the one of the record: give --input_path" in capsys.readouterr().err


def test_resume_skips_what_is_there_and_equal(place, capsys):
    assert sample("photos/a.png", "--videos_per_image=2") == 0
    capsys.readouterr()
    assert sample("photos", "--videos_per_image=2", "--resume") == 0
    assert capsys.readouterr().out.count("there already") == 2
    assert len(names()) == 8
    Path("out/000000.mp4").unlink()
    assert sample("photos", "--videos_per_image=2", "--resume") == 0
    assert len(names()) == 9  # the record of the missing video, and a new video with its own


def test_resume_makes_what_differs(place, weights):
    """Caught: a part of the record that is not compared."""
    assert sample("photos/a.png") == 0
    other = write_tiny_checkpoint(place / "other.safetensors", seed=1)
    changes = ["--seed=2", "--fps=8", "--format=gif", "--max_guidance=3", f"--ckpt_path={other}"]
    for count, change in enumerate(changes, 2):
        assert sample("photos/a.png", "--resume", change) == 0
        assert len(names()) == 2 * count
    (place / "photos" / "a.png").write_bytes((place / "photos" / "b.png").read_bytes())
    assert sample("photos/a.png", "--resume") == 0
    assert len(names()) == 2 * len(changes) + 4


def test_each_video_of_a_picture_is_the_one_of_its_seed(place):
    """Caught: all videos from one generator, so that the second depends on the first."""
    assert sample("photos/a.png", "--format=png", "--videos_per_image=2", "--seed=30") == 0
    assert sample("photos/a.png", "--format=png", "--seed=31") == 0
    first, second, alone = (
        np.stack([np.asarray(Image.open(path)) for path in sorted(Path(folder).iterdir())])
        for folder in ("out/000000", "out/000001", "out/000002")
    )
    assert np.array_equal(second, alone)
    assert not np.array_equal(first, alone)


# Interruption and progress


class Terminal(io.StringIO):
    """Standard error as a terminal, which sends an interrupt when it reads a word."""

    def __init__(self, interrupt_at=None):
        super().__init__()
        self.interrupt_at = interrupt_at

    def isatty(self):
        return True

    def write(self, text):
        if self.interrupt_at and self.interrupt_at in text:
            self.interrupt_at = None
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_progress_of_all_stages_on_a_terminal(place, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert sample("photos/a.png", "--num_steps=3", "--decoding_t=1") == 0
    shown = terminal.getvalue()
    for words in ("loading tiny", "sampling 1/3, ", " left", "sampling 3/3", "decoding 1/2, "):
        assert words in shown.replace("svd_tiny.safetensors", "tiny")


@pytest.fixture
def interruptible():
    """Python's own reaction, also where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("moment", ["loading", "sampling 1/2", "decoding 2/2"])
def test_interrupt_leaves_nothing(place, monkeypatch, moment):
    """Caught: a number that stays claimed, a temporary file, a traceback."""
    terminal = Terminal(moment)
    monkeypatch.setattr(sys, "stderr", terminal)
    assert sample("photos/a.png", "--num_steps=2") == 130
    assert names() == []
    assert terminal.getvalue().endswith("\ninterrupted: only finished videos are kept\n")


@pytest.mark.usefixtures("interruptible")
def test_interrupt_while_writing_leaves_nothing(place, monkeypatch):
    def half(frames, path, fps):
        path.write_bytes(b"half")
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setitem(videos.WRITERS, "gif", half)
    assert sample("photos/a.png", "--format=gif") == 130
    assert names() == []


def test_a_long_run_is_announced(place, capsys, monkeypatch):
    monkeypatch.setattr("sgm.inference.estimate.LONG", 1e-9)
    assert sample("photos/a.png", "--device=cpu") == 0
    assert "svd_tiny on this CPU: about " in capsys.readouterr().err


def test_too_little_memory_is_one_line(place, capsys, monkeypatch):
    """Caught: a traceback; while sampling, a run that ends with the first video."""
    full = RuntimeError("DefaultCPUAllocator: can't allocate memory")

    def fail(*_args, **_options):
        raise full

    with monkeypatch.context() as patch:
        patch.setattr("sgm.checkpoint.load_checkpoint", fail)
        assert sample("photos") == 2
    assert "error: out of memory: svd_tiny does not fit on cpu; try" in capsys.readouterr().err
    monkeypatch.setattr("sgm.inference.generation.embed", fail)
    assert sample("photos") == 1
    printed = capsys.readouterr().err
    assert printed.count("error: out of memory: try --memory min, fewer or smaller frames") == 2
    assert "Traceback" not in printed
    assert names() == []


def test_a_picture_without_an_object_is_refused_before_the_model_is_loaded(
    place, capsys, monkeypatch
):
    """Caught: minutes of loading for an orbit that cannot be made."""
    monkeypatch.setitem(sys.modules, "rembg", None)
    (place / "checkpoints" / "sv3d_u.safetensors").write_bytes(b"not read")
    OmegaConf.save(tiny_config(), place / "configs" / "sv3d_u.yaml")
    assert sample("photos/a.png", "--version=sv3d_u") == 1
    assert "SV3D needs the object alone" in capsys.readouterr().err
