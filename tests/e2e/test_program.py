"""What programs do when standard output takes no more, or not everything; and at Ctrl-C."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import write_tiny_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "scripts" / "sampling" / "simple_video_sample.py"
PROGRAMS = [SAMPLE, ROOT / "main.py", *sorted((ROOT / "scripts").glob("*.py"))]
PROGRAMS = [path for path in PROGRAMS if "run_program(main)" in path.read_text()]
FULL = "error: standard output cannot be written: No space left on device\n"


def start(command, output, **environment):
    """Run Python with its standard output going to ``output``."""
    return subprocess.run(
        [sys.executable, *command],
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": ""} | environment,  # where argparse hides errors
        check=False,
    )


def without_reader(command):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        return start(command, pipe)


def on_a_full_disk(command):
    with Path("/dev/full").open("w") as full:
        return start(command, full)


def test_the_programs_are_found():
    assert {path.stem for path in PROGRAMS} == {
        "simple_video_sample",
        "main",
        "inspect_checkpoint",
        "convert",
        "download",
        "export",
        "merge_lora",
        "prepare_videos",
    }


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_help_that_cannot_be_printed(program):
    """Caught: a traceback; Python's own complaint when it flushes at the exit, code 120."""
    done = on_a_full_disk([program, "--help"])
    assert (done.returncode, done.stderr) == (2, FULL)
    done = without_reader([program, "--help"])
    assert (done.returncode, done.stderr) == (141, "")


def test_facts_that_cannot_be_printed(tmp_path):
    """Caught: BrokenPipeError with traceback, code 1."""
    tiny = write_tiny_checkpoint(tmp_path / "tiny.safetensors")
    done = without_reader(["scripts/inspect_checkpoint.py", tiny])
    assert (done.returncode, done.stderr) == (141, "")


def test_a_written_file_whose_line_cannot_be_printed():
    """Caught: OSError with traceback, code 1, of what the writing programs share."""
    code = "import sys, types, scripts.program, scripts.writing\n"
    code += "written = types.SimpleNamespace(path='x', size=1, sha256='0')\n"
    code += "run = lambda: scripts.writing.run(lambda _: (written,))\n"
    code += "sys.exit(scripts.program.run_program(run))"
    done = on_a_full_disk(["-c", code])
    assert (done.returncode, done.stderr) == (2, FULL)


def test_a_video_whose_line_cannot_be_printed(tmp_path):
    """Caught: the same of sampling. The video is complete, and the last."""
    command = [SAMPLE, "--version=svd_tiny", "--num_frames=2", "--num_steps=1"]
    many = ["--videos_per_image=3", f"--output_folder={tmp_path}"]
    done = without_reader([*command, "assets/sample.jpg", *many])
    assert (done.returncode, done.stderr) == (141, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000.json", "000000.mp4"]


def test_every_line_can_be_printed_and_stays_one(tmp_path):
    """Caught: UnicodeEncodeError; a file's name with a newline that makes two lines of one."""
    code = "from scripts.program import run_program, say\nimport sys\n"
    code += r"sys.exit(run_program(lambda: say('ünï 日本\n\x1b[2J.jpg', 'two') or 1))"
    with (tmp_path / "out").open("wb") as out:
        done = start(["-c", code], out, PYTHONIOENCODING="ascii:strict")
    assert (done.returncode, done.stderr) == (1, "")
    assert (tmp_path / "out").read_text() == "\\xfcn\\xef \\u65e5\\u672c\\n\\x1b[2J.jpg\ntwo\n"


INTERRUPTED = """
import os, runpy, signal, sys

class Interruption:
    def find_spec(self, name, *_):
        if name == module:
            os.kill(os.getpid(), signal.SIGINT)

_, module, script = sys.argv
sys.meta_path.insert(0, Interruption())
sys.argv = [script, "--version=svd_tiny"]
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("module", "code", "words"),
    [
        ("sgm.inference.batch", -signal.SIGINT, ""),  # 130 to a shell
        ("fire", 130, "interrupted: only finished videos are kept\n"),
    ],
)
def test_ctrl_c_while_modules_are_imported(module, code, words):
    """Caught: a traceback, as the modules that the program begins with lie outside its main; and
    the program that from then on ends without a word."""
    done = start(["-c", INTERRUPTED, module, str(SAMPLE)], subprocess.DEVNULL)
    assert (done.returncode, done.stderr) == (code, words)
