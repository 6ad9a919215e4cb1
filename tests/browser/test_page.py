"""The page in a real browser: Chromium against a real server, with the bundled model.

One server serves all tests; each visitor is a browser context of its own. Skipped where there is
neither Playwright nor Chromium.
"""

import io
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path
from shutil import which

import numpy as np
import pytest
from PIL import Image

sync_api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not here")
CHROMIUM = which("chromium") or which("chromium-browser") or which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is here")

ROOT = Path(__file__).parents[2]
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"),
    *("--disable-component-update", "--disable-sync"),
]
SECONDS = 120_000  # milliseconds to wait for the server, which shares its processors
QUICK = "num_steps=3&num_frames=6"
LONG = "num_steps=100&num_frames=20"
SETTINGS = """\
models: [svd_tiny, svd_xt]
max_upload_mb: 8
output_folder: {folder}
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A server with the operator's settings, started from elsewhere; its address."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "settings.yaml").write_text(SETTINGS.format(folder=folder / "outputs"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "streamlit", "run", str(ROOT / "scripts/demo/video_sampling.py")),
        *("--server.port", str(port), "--server.headless", "true", "--", "--settings"),
        str(folder / "settings.yaml"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        try:
            _wait_for(f"http://localhost:{port}/_stcore/health")
            yield f"http://localhost:{port}"
        finally:
            server.terminate()
            server.wait(20)


def _wait_for(address):
    end = time.monotonic() + SECONDS / 1000
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail("the server does not answer")


@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, address):
    """Open the page as a new visitor; at the end, no console may hold an error."""
    contexts, troubles = [], []

    def open_page(query="", **context):
        contexts.append(chromium.new_context(**context))
        page = contexts[-1].new_page()
        page.set_default_timeout(SECONDS)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda said: said.type == "error" and troubles.append(said.text))
        page.goto(f"{address}/?{query}")
        page.get_by_text("About", exact=False).first.wait_for()  # the cost comes last
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not troubles


def upload(page, *files):
    page.get_by_role("radio", name="Upload").click()
    page.locator("input[type=file]").set_input_files(
        [{"name": name, "mimeType": kind, "buffer": data} for name, kind, data in files]
    )


def make(page):
    page.get_by_role("button", name="Make the video").click()


def wait_for_video(page):
    """The first video, playing."""
    video = page.locator("video").first
    video.wait_for(state="visible")
    page.wait_for_function("document.querySelector('video').currentTime > 0")
    return video


def jpeg_of_a_phone():
    """Held upright: stored lying, with an EXIF orientation that turns it. Red is on top."""
    upright = np.zeros((480, 320, 3), np.uint8)
    upright[:240, :, 0], upright[240:, :, 2] = 220, 220
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    file = io.BytesIO()
    Image.fromarray(np.rot90(upright)).save(file, "jpeg", exif=exif)
    return file.getvalue()


def bomb():
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "png")
    return file.getvalue()


def test_a_phone_photo_becomes_a_video(visit):
    # Catches: a lying picture, progress or preview that stand still, a video that does not play,
    # a file that is not the one shown, a link that does not give the same page again.
    page = visit("num_steps=60&num_frames=6&fps=5")
    upload(page, ("IMG_0001.jpg", "image/jpeg", jpeg_of_a_phone()))
    page.get_by_text("320 x 480 becomes 64 x 64 pixels").wait_for()
    motion = page.get_by_role("slider", name="Motion")
    motion.focus()
    for _ in range(3):
        motion.press("ArrowRight")
    page.wait_for_url(re.compile("motion_bucket_id=130"))

    make(page)
    preview = page.get_by_alt_text("The frames so far, roughly")
    preview.wait_for()
    texts, sources = set(), set()
    while preview.count() and not page.locator("video").count():
        try:
            texts.add(page.get_by_test_id("stProgress").inner_text(timeout=500))
            sources.add(preview.get_attribute("src", timeout=500))
        except sync_api.TimeoutError:
            break
        page.wait_for_timeout(200)
    assert len(sources) > 1
    assert sum(bool(re.search(r"\d+/60", text)) for text in texts) > 1

    wait_for_video(page)
    width, duration = page.evaluate(
        "(v => [v.videoWidth, v.duration])(document.querySelector('video'))"
    )
    assert (width, round(duration, 1)) == (64, 1.2)
    with page.expect_download() as download:
        page.get_by_role("button", name="PNG (zip)").click()
    assert download.value.suggested_filename == "svd_tiny_23.zip"
    with zipfile.ZipFile(download.value.path()) as archive:
        assert len(archive.namelist()) == 6
        first = np.asarray(Image.open(io.BytesIO(archive.read(archive.namelist()[0]))), float)
    red, blue = first[:20].mean((0, 1)), first[-20:].mean((0, 1))
    assert red[0] > red[2]
    assert blue[2] > blue[0]

    again = visit(page.url.partition("?")[2])
    assert again.get_by_role("slider", name="Motion").input_value() == "130"
    assert again.get_by_role("slider", name="Length").input_value() == "6"


def test_cancel_midway_ends_the_run(visit):
    # Catches: a page that is blocked while it runs, a cancel that waits for the end.
    page = visit(LONG)
    make(page)
    page.get_by_text(re.compile("Sampling")).wait_for()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_text("The video will appear here.").wait_for()
    page.get_by_role("button", name="Cancel").wait_for(state="detached")
    assert not page.locator("video").count()


def test_two_visitors_at_once_each_get_their_own(visit):
    # Catches: one who waits for ever, one who sees the other's video.
    first, second = visit("num_steps=10&num_frames=6"), visit(QUICK + "&seed=4")
    make(first)
    first.get_by_role("button", name="Cancel").wait_for()
    make(second)
    wait_for_video(second)
    wait_for_video(first)
    assert "seed 23" in first.get_by_text(re.compile("^svd_tiny, 6 frames")).inner_text()
    assert "seed 4" in second.get_by_text(re.compile("^svd_tiny, 6 frames")).inner_text()
    for page in (first, second):
        assert page.get_by_role("button", name="Show").count() == 1


def test_refused_files_and_models_are_a_line(visit):
    # Catches: a bomb that is decoded, a text taken for a picture, a model that cannot run offered.
    page = visit("version=svd_xt")
    page.get_by_text("the weights of svd_xt are not here").wait_for()
    upload(
        page,
        ("large.png", "image/png", bomb()),
        ("notes.png", "image/png", b"no picture"),
        ("huge.png", "image/png", bytes(9_000_000)),
    )
    page.get_by_text("the picture is larger than the 60 megapixels allowed here").wait_for()
    page.get_by_text("not a jpeg, png, webp, gif, bmp or tiff picture").wait_for()
    page.get_by_text(re.compile("8.*MB or smaller")).wait_for()
    assert page.get_by_role("button", name="Make the video").is_disabled()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it(visit, scheme):
    # Catches: widgets wider than a phone, controls without a name, what only a mouse can reach.
    size = {"width": 390, "height": 844}
    page = visit(QUICK, viewport=size, color_scheme=scheme, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    overflowing = page.evaluate(
        "[...document.querySelectorAll('[data-testid=stMain] button, img, input, video')]"
        ".filter(e => e.getBoundingClientRect().right > 391).length"
    )
    assert overflowing == 0
    page.get_by_role("button", name="Make the video").press("Enter")
    wait_for_video(page)
    nameless = page.evaluate(
        "[...document.querySelectorAll('[data-testid=stMain] [role=slider], input, select')]"
        ".filter(e => e.type != 'file' && !e.labels?.length && !e.getAttribute('aria-label')"
        " && !e.getAttribute('aria-labelledby')).map(e => e.outerHTML)"
    )
    assert nameless == []
