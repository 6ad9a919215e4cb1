"""The page in Gradio, which is an HTTP API as well: ``python -m scripts.demo.gradio_app``.

Its parameters are the options of the command line, under the same names. From Python, after
``pip install gradio_client``::

    from gradio_client import Client, handle_file

    client = Client("http://127.0.0.1:7860")
    picture = {"image": handle_file("photo.jpg")}
    files, records, _ = client.predict(pictures=[picture], seed=7, api_name="/generate")

``files`` are the videos, ``records`` what made each of them, as JSON; ``client.view_api()`` lists
all parameters.
From elsewhere: the page's footer says how under "Use via API". Cancel a run with ``/cancel``.
"""

import json
import os
import secrets
import sys
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import wraps
from hashlib import sha256
from html import escape
from inspect import Parameter, Signature, signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import gradio as gr

from scripts.demo.arguments import page_parser
from scripts.demo.gradio_widgets import (
    asked_options,
    model_input,
    option_inputs,
    picture_input,
    take_uploads_alone,
)
from sgm.errors import one_line
from sgm.inference.flags import SAMPLE_PICTURE
from sgm.inference.specs import find_file, get_spec
from sgm.inference.videos import write_video
from sgm.serving.gallery import Run
from sgm.serving.limits import Limits
from sgm.serving.queue import Cancelled, Ticket
from sgm.serving.reporting import RunProgress, in_words
from sgm.serving.studio import Order, Studio

TITLE = "A picture becomes a video"
POLL_SECONDS = 0.3
SPARE_THREADS = 40  # beside those in which orders wait
STYLE = ".preview img { width: 100%; } .preview progress { width: 100%; }"

Pictures = Sequence[tuple[str, str | None]] | None
Outputs = tuple[list[str] | None, str | None, str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until interrupted; returns the exit code."""
    asked = _parse(arguments)
    try:
        limits = Limits.read(asked.settings)
        # A file may still be on its way out when the server ends: its folder is left to the system.
        with (
            TemporaryDirectory(ignore_cleanup_errors=True) as folder,
            closing(Studio(limits)) as studio,
        ):
            launch(studio, folder, asked.host, asked.port).block_thread()
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def launch(studio: Studio, folder: str, host: str = "127.0.0.1", port: int | None = None) -> Any:
    """Begin to serve, to this machine's network alone and with nobody told of it.

    Args:
        studio: makes the videos.
        folder: for what is uploaded, and for the videos on their way out.
        host: address to listen on; 0.0.0.0 for all.
        port: None for the first free one from 7860 on.

    Returns:
        The running page, with ``local_url``, ``block_thread()`` and ``close()``.

    Raises:
        ValueError: there is no model to offer.
        OSError: the port is taken.
    """
    os.environ["GRADIO_TEMP_DIR"] = folder
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    page = build(studio)
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        prevent_thread_lock=True,
        max_threads=studio.limits.max_queue + SPARE_THREADS,
        max_file_size=round(studio.limits.max_upload_mb * 10**6),
        footer_links=["api"],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        css=STYLE,
        quiet=True,
    )
    print(f"The page is at {page.local_url}", flush=True)
    return page


def build(studio: Studio) -> gr.Blocks:
    """Lay out the page.

    Raises:
        ValueError: there is no model to offer.
    """
    desk = Desk(studio)
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"# {TITLE}")
        with gr.Row():
            with gr.Column():
                pictures = picture_input()
                version = model_input(studio)
                options = option_inputs(studio, version)
            with gr.Column():
                with gr.Row():
                    make = gr.Button("Make the video", variant="primary")
                    cancel = gr.Button("Cancel")
                progress = gr.HTML(label="Progress", elem_classes="preview")
                with gr.Column(visible=False) as result:
                    player = gr.Video(label="Video", autoplay=True, loop=True, interactive=False)
                    files = gr.File(
                        label="Files", file_count="multiple", interactive=False, height=120
                    )
                    take_uploads_alone(files)
                    with gr.Accordion("What made it", open=False):
                        # As text: gr.JSON takes every entry named "path" for a file to fetch.
                        records = gr.Code(label="Records", language="json", interactive=False)
        # The studio has a queue of its own: Gradio's hands everything to it at once.
        making = make.click(
            _with_names(desk.generate, options),
            [version, pictures],
            [files, records, progress],
            inputs_kwargs=options,
            api_name="generate",
            concurrency_limit=None,
            show_progress="hidden",
        )
        cancel.click(desk.cancel, api_name="cancel", concurrency_limit=None)
        hidden: Any = {"api_visibility": "private", "queue": False}
        make.click(lambda: gr.update(visible=False), None, result, **hidden)
        making.success(_shown, files, [result, player], **hidden)
        files.select(_selected, files, player, **hidden)
    return page


class Desk:
    """Takes the visitors' orders to the studio, and says how they go.

    Args:
        studio: makes the videos.
    """

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self._salt = secrets.token_hex(16)
        self._tickets: dict[str, set[Ticket]] = {}

    def generate(
        self, request: gr.Request, version: str, pictures: Pictures = None, **options: Any
    ) -> Iterator[Outputs]:
        """Make videos: their files, what made each, and on the way there how far it is."""
        visitor = self._visitor(request)
        with _errors_in_one_line():
            asked = asked_options(options, get_spec(version))
            ticket = self.studio.submit(visitor, Order(version, _read(pictures), asked))
            self._tickets.setdefault(visitor, set()).add(ticket)
            try:
                for text in _follow(ticket, asked.fps):
                    yield None, None, text
                yield from _hand_over(ticket.result())
            except Cancelled:
                yield None, None, "Cancelled"
            finally:
                ticket.cancel()  # where the visitor has gone
                self._forget(visitor, ticket)

    def cancel(self, request: gr.Request) -> None:
        """Call off what this visitor has ordered."""
        for ticket in list(self._tickets.get(self._visitor(request), ())):
            ticket.cancel()

    def _forget(self, visitor: str, ticket: Ticket) -> None:
        tickets = self._tickets[visitor]
        tickets.discard(ticket)
        if not tickets:
            del self._tickets[visitor]

    def _visitor(self, request: gr.Request) -> str:
        """The name under which the studio knows a page, or a program's client."""
        session = request.session_hash or secrets.token_hex(16)
        return sha256(f"{self._salt} {session}".encode()).hexdigest()[:32]


def _with_names(
    generate: Callable[..., Iterator[Outputs]], names: Iterable[str]
) -> Callable[..., Iterator[Outputs]]:
    """The same with a signature that names the options: what Gradio's API is made from."""
    own = [p for p in signature(generate).parameters.values() if p.kind is not p.VAR_KEYWORD]
    options = [Parameter(name, Parameter.KEYWORD_ONLY, default=None) for name in names]

    @wraps(generate)
    def named(*args: Any, **values: Any) -> Iterator[Outputs]:
        yield from generate(*args, **values)

    public: Any = named
    public.__signature__ = Signature([*own, *options])
    return named


def _read(pictures: Pictures) -> tuple[bytes, ...]:
    """The files of the pictures, or of the sample; Gradio has seen to it that they are uploads."""
    if pictures:
        return tuple(Path(path).read_bytes() for path, _ in pictures)
    sample = find_file(SAMPLE_PICTURE)
    if sample is None:
        raise ValueError("expected a picture, got none")
    return (sample.read_bytes(),)


def _follow(ticket: Ticket, fps: int) -> Iterator[str]:
    """How far an order is, whenever that has changed, until it is finished."""
    shown: Any = None
    while not ticket.wait(POLL_SECONDS):
        now = ticket.position, ticket.progress
        if now != shown:
            shown = now
            yield _in_html(*now, fps)


def _in_html(position: int | None, progress: RunProgress | None, fps: int) -> str:
    value = f' value="{progress.fraction:.3f}"' if progress else ""
    shown = f"<p>{escape(in_words(position, progress))}</p><progress{value}></progress>"
    if progress is None or progress.preview is None:
        return shown
    with TemporaryDirectory() as folder:
        path = write_video(progress.preview, Path(folder, "preview.webp"), fps)
        image = b64encode(path.read_bytes()).decode()
    alt = "The frames so far, roughly"
    return f'{shown}<img alt="{alt}" src="data:image/webp;base64,{image}">'


def _hand_over(runs: Sequence[Run]) -> Iterator[Outputs]:
    """The files and records of the videos; Gradio copies the files while this waits."""
    with TemporaryDirectory() as folder:
        paths = [Path(folder, str(number), f"{run.name}.mp4") for number, run in enumerate(runs)]
        for path, run in zip(paths, runs, strict=True):
            path.parent.mkdir()
            path.write_bytes(run.file("mp4"))
        yield list(map(str, paths)), json.dumps([run.record for run in runs], indent=2), "Done"


def _shown(paths: list[str] | None) -> tuple[Any, str | None]:
    """The result in sight, if there is one, and its first video."""
    return gr.update(visible=bool(paths)), paths[0] if paths else None


def _selected(paths: list[str], event: gr.SelectData) -> str:
    return paths[event.index]


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """Show what the visitor or the operator can mend as one line, here and to programs."""
    try:
        yield
    except (ValueError, OSError, MemoryError) as error:
        raise gr.Error(one_line(error), print_exception=False) from error


def _parse(arguments: Sequence[str] | None) -> Any:
    parser = page_parser(__doc__)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address; 0.0.0.0 for all (%(default)s)"
    )
    parser.add_argument("--port", type=int, help="the first free one from 7860 on where not given")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
