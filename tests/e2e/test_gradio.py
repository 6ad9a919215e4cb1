"""The page in Gradio as a program sees it, on the random one-second model."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import av
import httpx
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from omegaconf import OmegaConf
from PIL import Image

from scripts.demo.arguments import settings_file
from scripts.demo.gradio_app import main
from scripts.sampling.simple_video_sample import main as command_line
from sgm.inference import specs
from sgm.inference.options import GROUPS, option_fields
from tests.tiny import tiny_config, write_tiny_checkpoint

ROOT = Path(__file__).resolve().parents[2]
PATIENT = {"timeout": 60}  # seconds; the default of five is short on a busy machine
FAR = {"path": "http://example.com/picture.png", "meta": {"_type": "gradio.FileData"}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working directory, the only place where models are looked for, with one of them."""
    place = tmp_path_factory.mktemp("place")
    for folder in ("checkpoints", "configs", "assets"):
        (place / folder).mkdir()
    write_tiny_checkpoint(place / "checkpoints" / "svd_tiny.safetensors")
    OmegaConf.save(tiny_config(), place / "configs" / "svd_tiny.yaml")
    noise = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(place / "assets" / "sample.jpg")
    Image.fromarray(noise[:50]).save(place / "other.png")
    (place / "notes.png").write_text("no picture")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(specs, "ROOT", place)
        yield place


# Notes where connections to anywhere but this machine were to go, and refuses them.
PROGRAM = """
import ipaddress, pathlib, socket, sys
connect, look_up = socket.socket.connect, socket.getaddrinfo

def refuse(place):
    with open("tried.txt", "a") as file:
        print(place, file=file)
    raise ConnectionRefusedError(place)

def local_only(self, address):
    local = self.family == socket.AF_UNIX or ipaddress.ip_address(address[0]).is_loopback
    return connect(self, address) if local else refuse(address)

def local_names(host, *args, **kwargs):
    local = host in (None, "", "localhost", "127.0.0.1", "::1", "0.0.0.0")
    return look_up(host, *args, **kwargs) if local else refuse(host)

socket.socket.connect, socket.getaddrinfo = local_only, local_names
from scripts.demo.gradio_app import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def url(place):
    """Address of the page, served by a process of its own."""
    settings = place / "settings.yaml"
    settings.write_text("{max_frames: 6, max_upload_mb: 0.5, max_pictures: 2}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, f"--port={port}", f"--settings={settings}"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default"},
        stdout=subprocess.PIPE,
        text=True,
    )
    with served:
        for line in served.stdout:
            if line.startswith("The page is at "):
                yield line.split()[-1]
                break
        served.send_signal(signal.SIGINT)
        served.stdout.read()  # its last words, which it could not say to a closed pipe
    assert served.returncode == 0  # also where it did not begin


@pytest.fixture(scope="module")
def client(url, tmp_path_factory):
    got = tmp_path_factory.mktemp("got")
    return Client(url, download_files=got, verbose=False, httpx_kwargs=dict(PATIENT))


def picture(name):
    return {"image": handle_file(name)}


def frames(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def generate(client, *names, **options):
    return client.predict(pictures=[picture(n) for n in names], api_name="/generate", **options)


def wait_for_sampling(job):
    while not any("sampling" in outputs[2].lower() for outputs in job.outputs()):
        assert not job.done()
        time.sleep(0.05)


def test_frames_are_the_command_lines(place, client):
    """Catches: a widget whose value is lost or goes elsewhere, a default of the page's own."""
    flags = {
        "seed": 5,
        "num_frames": 3,
        "motion_bucket_id": 40,
        "background": "red",
        "fit": "contain",
    }
    flags |= {"max_guidance": 4.5, "sampler": "heun", "fps": 9, "cond_aug": 0.3}
    (file,), records, _ = generate(client, "other.png", **flags)
    (record,) = json.loads(records)
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    assert command_line(["other.png", *arguments, "--output_folder=told"]) == 0
    assert Path(file).name == "svd_tiny_5.mp4"
    assert Path(file).read_bytes() == (place / "told" / "000000.mp4").read_bytes()
    told = json.loads((place / "told" / "000000.json").read_text())
    assert record["options"] == told["options"]
    assert str(place) not in json.dumps(record)  # no paths of the host


def test_defaults_and_several_videos(client):
    """Catches: a second set of defaults, one file for many, files of one name that are one."""
    assert command_line(["assets/sample.jpg", "--output_folder=usual"]) == 0
    files, records, _ = generate(client, videos_per_image=2)
    assert [record["options"]["seed"] for record in json.loads(records)] == [23, 24]
    assert np.array_equal(frames(files[0]), frames("usual/000000.mp4"))
    assert not np.array_equal(frames(files[0]), frames(files[1]))
    two, _, _ = generate(client, "assets/sample.jpg", "other.png", num_frames=1, num_steps=1)
    assert not np.array_equal(frames(two[0]), frames(two[1]))


def test_progress_is_shown_on_the_way(client):
    """Catches: a page that is still until the end, a preview that never comes."""
    job = client.submit(pictures=[], num_steps=60, num_frames=6, api_name="/generate")
    shown = [outputs[2] for outputs in job]
    assert shown[-1] == "Done"
    assert any("sampling" in text.lower() and "data:image/webp" in text for text in shown)
    images = {text.partition("base64,")[2] for text in shown if "base64" in text}
    assert len(images) > 1


def test_a_run_can_be_called_off(client):
    """Catches: a button that does nothing, a run that keeps the device."""
    job = client.submit(pictures=[], num_steps=100, num_frames=6, api_name="/generate")
    wait_for_sampling(job)
    client.predict(api_name="/cancel")
    files, _, text = job.result(timeout=60)
    assert (files, text) == (None, "Cancelled")


def test_who_leaves_makes_room(place, url, client):
    """Catches: a run that goes on for nobody."""
    gone = Client(url, verbose=False, httpx_kwargs=dict(PATIENT))
    job = gone.submit(pictures=[], num_steps=100, num_frames=6, api_name="/generate")
    wait_for_sampling(job)
    job.cancel()
    generate(client, num_steps=1)  # waits for its turn
    made = [json.loads(path.read_text()) for path in place.glob("outputs/demo/*/*.json")]
    steps = {record["options"]["num_steps"] for record in made}
    assert 1 in steps
    assert 100 not in steps


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["notes.png"], {}, "not a jpeg, png, webp, gif, bmp or tiff picture"),
        ([], {"num_frames": 7}, "num_frames must be at most 6 here, got 7"),
        ([], {"num_frames": 0}, "num_frames must be an integer from 1 to 1024, got 0"),
        ([], {"azimuths_deg": "0, north"}, "azimuths_deg must be a number or a list of them"),
        ([], {"height": 65}, "mp4 needs an even height and width"),
        (["other.png"] * 3, {}, "pictures"),
    ],
)
def test_what_is_refused_is_one_line(client, names, options, message):
    """Catches: a traceback, a limit that only the other page has."""
    with pytest.raises(AppError) as refused:
        generate(client, *names, **options)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "Traceback" not in str(refused.value)


def test_large_files_are_refused_while_they_come(url):
    """Catches: a limit that only a friendly client keeps."""
    for size, status in ((500_000, 200), (500_001, 413)):
        files = {"files": ("large.png", bytes(size))}
        answer = httpx.post(f"{url}gradio_api/upload", files=files, **PATIENT)
        assert answer.status_code == status


@pytest.mark.parametrize("place_of", ["checkpoints/svd_tiny.safetensors", "/etc/passwd"])
def test_no_file_of_the_host_is_read_or_served(place, url, client, place_of):
    """Catches: an allowed path, a picture that is named in place of being sent."""
    path = str((place / place_of).resolve())
    assert httpx.get(f"{url}gradio_api/file={path}", **PATIENT).status_code in (403, 404)
    assert called(url, client, path).startswith("error")


def test_no_address_is_fetched_for_a_visitor(place, url, client):
    """Catches: a host that asks others on a stranger's behalf, also by what only the page calls."""
    assert "addresses are not fetched" in called(url, client, FAR["path"])
    config = httpx.get(f"{url}config", **PATIENT).json()
    kinds = {each["id"]: each["type"] for each in config["components"]}
    for function in config["dependencies"]:
        if any(kinds[each] in ("gallery", "file") for each in function["inputs"]):
            data = [[FAR] if kinds[each] == "file" else None for each in function["inputs"]]
            asked = {"fn_index": function["id"], "data": data, "event_data": {"index": 0}}
            asked["session_hash"] = "x"
            answer = httpx.post(f"{url}gradio_api/run/predict", json=asked, **PATIENT)
            assert answer.status_code == 500
    assert not (place / "tried.txt").exists()


def called(url, client, path):
    """What plain HTTP answers where a picture is given as ``path``; event and data of the end."""
    data = [each.get("parameter_default") for each in api(client)["/generate"]["parameters"]]
    data[1] = [{"image": {"path": path, "meta": {"_type": "gradio.FileData"}}, "caption": None}]
    begun = httpx.post(f"{url}gradio_api/call/generate", json={"data": data}, **PATIENT).json()
    events = httpx.get(f"{url}gradio_api/call/generate/{begun['event_id']}", **PATIENT).text
    return events.strip().split("event: ")[-1]


def api(client):
    return client.view_api(return_format="dict", print_info=False)["named_endpoints"]


def test_every_option_is_a_parameter_but_the_hosts(client):
    """Catches: an option that the page forgets, one that names files or devices of the host."""
    names = {each["parameter_name"] for each in api(client)["/generate"]["parameters"]}
    options = [option for group in GROUPS for option in option_fields(group)]
    kinds = {option.name: option.metadata["kind"] for option in options}
    allowed = {name for name, kind in kinds.items() if kind not in ("files", "path", "device")}
    assert names == {"version", "pictures", *allowed}
    assert api(client).keys() == {"/generate", "/cancel"}


def test_nobody_else_is_told(place, url):
    """Catches: telemetry, a look for updates. Runs late: it sees all of the above."""
    assert httpx.get(f"{url}config", **PATIENT).json()["analytics_enabled"] is False
    assert not (place / "tried.txt").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--settings", "none.yaml"], "error: settings"),
        (["--settings", "wrong.yaml"], "error: settings"),
    ],
)
def test_a_wrong_settings_file_ends_the_program(place, capsys, arguments, message):
    Path("wrong.yaml").write_text("max_frame: 3")
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith(message)
    assert len(said.splitlines()) == 1


def test_an_unknown_argument_does_not_pass_for_a_limit():
    """Catches: a misspelt flag, and with it a page without its operator's limits."""
    assert settings_file([]) is None
    assert settings_file(["--settings", "limits.yaml"]) == Path("limits.yaml")
    for arguments in (["--setings", "limits.yaml"], ["limits.yaml"], ["--settings"]):
        with pytest.raises(ValueError, match="settings"):
            settings_file(arguments)
