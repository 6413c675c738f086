#!/usr/bin/env python
"""A web page: drop a picture, type class names, see boxes and scores.

    python tools/web_demo.py
    python tools/web_demo.py --compare "no distillation=output/miniature/atss"
    python tools/web_demo.py --config-file configs/hierkd_R50.yaml --opts MODEL.WEIGHTS model.pth

Without ``--run`` and ``--config-file`` it shows the detector that ``make demo`` trained, which
knows rendered icons only: photographs need a detector trained on photographs. It listens on this
machine alone, uses no other one, and writes into one temporary folder, which is removed at the end
(Ctrl-C). Needs Gradio: pip install -e '.[web]'. docs/web_demo.md says more.
"""

from __future__ import annotations

import hierkd  # noqa: F401  (first: it quiets two deprecation warnings inside libraries)

# isort: split
import argparse
import contextlib
import importlib
import importlib.util
import json
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from detectron2.utils.logger import setup_logger
from PIL import Image

from hierkd.files import replacing
from hierkd.inference.predictor import OpenVocabularyPredictor
from hierkd.inference.video import find_inputs, is_video
from hierkd.reports.demonstration import (
    DEFAULT_RUN,
    add_detector_options,
    icons_only,
    load_detector,
    parse_compared,
    title_of,
)
from hierkd.reports.page import escape
from hierkd.reports.web_page import (
    Found,
    Limits,
    PageError,
    Shown,
    detect,
    make_filter,
    safe_name,
    show,
)

logger = logging.getLogger("hierkd.web_demo")

INSTALL = "the page needs Gradio 6: pip install 'gradio>=6,<7' (or, here: pip install -e '.[web]')"
FIRST_PORT = 7860  # Gradio's own; the next free one, if it is taken
MINIATURE = "miniature/test"  # under $DETECTRON2_DATASETS, where the example pictures come from
NUM_EXAMPLES = 6
# Of what visitors left behind. [ours]
SESSIONS = 100  # pages whose last detections are kept; the longest unused ones go first
SECONDS_KEPT = 3600.0
WAITING = 50  # requests in the queue; further ones are turned away
MAX_REQUEST_BYTES = 1024**2  # of anything but an upload

HELLO = "Drop a picture."
FAILED = "The server could not do this; its log says why."
LOST = "The page was left alone for long: press Detect."


def get_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_detector_options(parser)
    add = parser.add_argument_group("the page").add_argument
    add("--host", default="127.0.0.1", help="address to listen on; default: this machine alone")
    add(
        "--port",
        type=int,
        help=f"default: {FIRST_PORT}, or the next free one; 0 is any free one",
    )
    add(
        "--examples",
        nargs="*",
        metavar="PATH",
        help="pictures, folders or globs to choose from on the page; default: "
        f"{NUM_EXAMPLES} of the miniature, if it is there",
    )
    limits = Limits()
    add = parser.add_argument_group("what visitors may send").add_argument
    add("--max-megabytes", type=int, default=limits.max_bytes // 1024**2, metavar="N",
        help="size of a picture file; default: %(default)s")  # fmt: skip
    add("--max-megapixels", type=float, default=limits.max_pixels / 1e6, metavar="N",
        help="millions of pixels of a picture; default: %(default)g")  # fmt: skip
    add("--max-names", type=int, default=limits.max_names, metavar="N",
        help="class names; default: %(default)s")  # fmt: skip
    return parser


# --- What the page does ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Visit:
    """What the server remembers of one open page.

    Attributes:
        found: All detections in its picture; None if there are none to show.
        problem: Why there are none.
        settings: Threshold and the like, with which they were shown last.
        token: Unguessable name of the folder with its downloads.
    """

    found: Found | None
    problem: str = ""
    settings: tuple[Any, ...] | None = None
    token: str = field(default_factory=lambda: secrets.token_hex(16))


@dataclass(frozen=True)
class Answer:
    """What a page shows next; without ``shown`` nothing of an earlier picture stays."""

    message: str
    kind: str  # "", "good" or "error"
    visit: Visit | None
    shown: Shown | None = None
    json_file: str | None = None
    png_file: str | None = None


class Handlers:
    """What happens on events of the page; each page's detections are in its own :class:`Visit`."""

    def __init__(
        self, predictors: Mapping[str, OpenVocabularyPredictor], limits: Limits, folder: Path
    ) -> None:
        """Take the detectors, by title, and a folder for the files to download."""
        self.predictors = dict(predictors)
        self.limits = limits
        self.folder = folder

    def detect(
        self,
        before: Visit | None,
        upload: Mapping[str, Any] | None,
        names: str | None,
        threshold: float | None,
        top_k: float | None,
        class_thresholds: str | None,
    ) -> Answer:
        """Answer a new picture, or new names."""
        self.forget(before)
        if upload is None:
            return Answer(HELLO, "", None)
        path = upload["path"]
        try:
            name = upload.get("orig_name") or path
            found = detect(self.predictors, path, names, self.limits, file_name=name)
        except PageError as error:
            return Answer(str(error), "error", Visit(None, str(error)))
        except Exception:  # whatever it was, the old answer must not stay beside the new picture
            logger.exception("detecting has failed")
            return Answer(FAILED, "error", Visit(None, FAILED))
        visit = Visit(found)
        shown = self.show(visit, upload, threshold, top_k, class_thresholds)
        return shown or Answer("", "", visit)  # never None: nothing was shown before

    def show(
        self,
        visit: Visit | None,
        upload: Mapping[str, Any] | None,
        threshold: float | None,
        top_k: float | None,
        class_thresholds: str | None,
    ) -> Answer | None:
        """Answer a moved threshold; no detector is asked. None: it shows in the page already."""
        if visit is None:
            return Answer(HELLO if upload is None else LOST, "", None)
        settings = (threshold, top_k, class_thresholds)
        if settings == visit.settings:
            return None
        visit = replace(visit, settings=settings)
        if visit.found is None:
            return Answer(visit.problem, "error", visit)
        try:
            keep = make_filter(threshold, top_k, class_thresholds, visit.found.vocabulary)
            shown = show(visit.found, keep)
            files = self._write(visit, visit.found.file_name, shown)
        except PageError as error:
            return Answer(str(error), "error", visit)
        except Exception:
            logger.exception("showing has failed")
            return Answer(FAILED, "error", visit)
        return Answer(shown.summary, "good", visit, shown, *files)

    def _write(self, visit: Visit, file_name: str, shown: Shown) -> tuple[str, str]:
        folder = self.folder / visit.token
        folder.mkdir(exist_ok=True)
        stem = safe_name(Path(file_name).stem)
        values, picture = folder / f"{stem}_detections.json", folder / f"{stem}_detections.png"
        with replacing(values) as making:
            making.write_text(json.dumps(shown.content, indent=1) + "\n", encoding="utf-8")
        with replacing(picture) as making:
            Image.fromarray(shown.sheet()).save(making, format="PNG", compress_level=1)
        return str(values), str(picture)

    def forget(self, visit: Visit | None) -> None:
        """Remove the files of a picture that is no longer looked at."""
        if visit is not None:
            shutil.rmtree(self.folder / visit.token, ignore_errors=True)


# --- What the page looks like ---------------------------------------------------------------------

STYLE = """
.gradio-container, .gradio-container > main { width: 100% !important; max-width: 1480px !important;
  margin: 0 auto !important; }
#title h1 { font-size: 1.6rem; margin: .2rem 0 .1rem; }
#title p { margin: 0; opacity: .75; }
#side { max-width: 460px; }
#message .html-container, #icons_only .html-container,
.found .html-container { padding: 0 !important; }
.message { padding: .6rem .9rem; border-radius: 8px; border: 1px solid var(--border-color-primary);
  background: var(--background-fill-secondary); color: var(--body-text-color);
  overflow-wrap: anywhere; }
.message.error { border-color: #d92d20; background: #fef3f2; color: #912018; font-weight: 500; }
.message.note { border-color: #e0b252; background: #fffaeb; color: #7a4100; }
.message.good { border-color: #a6d5b5; background: #f1faf4; color: #14532d; }
#downloads { justify-content: flex-end; }
#downloads button { flex: 0 0 auto; }
.detector h3 { margin: 0; font-size: 1.05rem; }
.panel .icon-button-wrapper { opacity: 0; }  /* it would cover labels */
.panel:hover .icon-button-wrapper, .panel:focus-within .icon-button-wrapper { opacity: 1; }
.found { max-height: 22rem; overflow: auto; }
.found table, .found thead, .found tbody, .found tr { border: 0 !important; }
.found table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
.found th, .found td { text-align: left; padding: .3rem .7rem .3rem 0 !important;
  border: 0 !important; border-bottom: 1px solid var(--border-color-primary) !important;
  overflow-wrap: anywhere; }
.found th { font-weight: 500; opacity: .75; }
.found td:nth-child(2) { white-space: nowrap; }
.found i { display: inline-block; width: .85em; height: .85em; border-radius: 2px;
  margin-right: .5em; vertical-align: -.05em; border: 1px solid rgba(0, 0, 0, .25); }
.dark .message.error { background: #3b1210; color: #fecdca; }
.dark .message.note { border-color: #8a6116; background: #2e2208; color: #fedf89; }
.dark .message.good { border-color: #2f6b45; background: #10291a; color: #d1f0dc; }
@media (max-width: 900px) { #side { max-width: none; } }
"""


@dataclass(frozen=True)
class Inputs:
    """What a visitor sets: Gradio's components."""

    picture: Any
    classes: Any
    button: Any
    threshold: Any
    top_k: Any
    class_thresholds: Any

    @property
    def settings(self) -> list[Any]:
        """Those that need no new detection."""
        return [self.threshold, self.top_k, self.class_thresholds]


@dataclass(frozen=True)
class Outputs:
    """What a visitor is shown: Gradio's components, ``panels`` and ``tables`` one a detector."""

    message: Any
    results: Any
    panels: list[Any]
    tables: list[Any]
    json_file: Any
    png_file: Any


def build_page(gr: Any, handlers: Handlers, names: str, examples: Sequence[Path]) -> Any:
    """Lay out the page.

    Args:
        gr: The module ``gradio``.
        handlers: What it does.
        names: Class names that are there to begin with.
        examples: Pictures to choose from.

    Returns:
        The ``gradio.Blocks``, to be given to :func:`launch`.
    """
    with gr.Blocks(
        title="HierKD", analytics_enabled=False, fill_width=True, delete_cache=(600, SECONDS_KEPT)
    ) as page:
        visit = gr.State(None, time_to_live=SECONDS_KEPT, delete_callback=handlers.forget)
        gr.Markdown(
            "# Open-vocabulary detection\nDrop a picture and name what to look for. "
            "Moving the threshold does not detect anew.",
            elem_id="title",
        )
        if icons := icons_only(handlers.predictors):
            gr.HTML(f'<div class="message note">{escape(icons)}</div>', elem_id="icons_only")
        with gr.Row(equal_height=False):
            inputs = _lay_out_inputs(gr, handlers.limits, names, examples)
            outputs = _lay_out_outputs(gr, list(handlers.predictors))
        _connect(gr, handlers, visit, inputs, outputs)
    page.queue(max_size=WAITING)
    return page


def _lay_out_inputs(gr: Any, limits: Limits, names: str, examples: Sequence[Path]) -> Inputs:
    with gr.Column(scale=2, min_width=320, elem_id="side"):
        picture = gr.Image(
            label="Picture",
            type="filepath",
            sources=["upload", "clipboard"],
            buttons=["fullscreen"],
            height=300,
            placeholder=f"Drop a picture here, or click\nup to {limits.max_bytes / 1024**2:g} MB",
            elem_id="picture",
        )
        classes = gr.Textbox(
            label="Classes, separated by commas",
            value=names,
            placeholder="cat, traffic cone, umbrella",
            lines=1,
            max_lines=6,
            elem_id="classes",
        )
        button = gr.Button("Detect", variant="primary", elem_id="detect")
        threshold = gr.Slider(
            0, 1, value=0.3, step=0.01, label="Score threshold", elem_id="threshold"
        )
        with gr.Accordion("More", open=False, elem_id="more"):
            top_k = gr.Slider(
                1, 100, value=100, step=1, label="At most, best first", elem_id="top_k"
            )
            class_thresholds = gr.Textbox(
                label="Thresholds of single classes",
                placeholder="dog=0.6, cup=0.2",
                elem_id="class_thresholds",
            )
        if examples:
            gr.Examples(
                [[str(path)] for path in examples],
                [picture],
                label="Or choose one",
                cache_examples=False,
                api_visibility="private",
            )
    return Inputs(picture, classes, button, threshold, top_k, class_thresholds)


def _lay_out_outputs(gr: Any, titles: Sequence[str]) -> Outputs:
    with gr.Column(scale=5, min_width=420):
        message = gr.HTML(_message(Answer(HELLO, "", None)), elem_id="message")
        with gr.Column(visible=False, elem_id="results") as results:
            with gr.Row(elem_id="downloads"):
                json_file = gr.DownloadButton("Download JSON", size="sm", elem_id="json")
                png_file = gr.DownloadButton("Download PNG", size="sm", elem_id="png")
            panels, tables = [], []
            with gr.Row(equal_height=False):
                for number, title in enumerate(titles):
                    with gr.Column(min_width=320, elem_classes="detector"):
                        gr.Markdown("### " + _as_markdown(title))
                        panels.append(
                            gr.Image(
                                show_label=False,
                                interactive=False,
                                buttons=["fullscreen"],
                                alt_text=f"Detections of {title}",
                                elem_id=f"panel_{number}",
                                elem_classes="panel",
                            )
                        )
                        tables.append(gr.HTML(elem_id=f"table_{number}", elem_classes="found"))
    return Outputs(message, results, panels, tables, json_file, png_file)


def _connect(gr: Any, handlers: Handlers, visit: Any, inputs: Inputs, outputs: Outputs) -> None:
    """Say which event calls what."""
    titles = list(handlers.predictors)

    def unpack(answer: Answer | None) -> Any:
        if answer is None:
            return gr.skip()
        shown = answer.shown
        return [
            answer.visit,
            _message(answer),
            gr.update(visible=shown is not None),
            *[shown.panels[title] if shown else None for title in titles],
            *[shown.tables[title] if shown else "" for title in titles],
            answer.json_file,
            answer.png_file,
        ]

    # One after the other, in the order in which they came: none overtakes another. The upload
    # comes as Gradio stored it (preprocess=False): Gradio would decode it without our limits.
    common = {
        "outputs": [
            visit,
            outputs.message,
            outputs.results,
            *outputs.panels,
            *outputs.tables,
            outputs.json_file,
            outputs.png_file,
        ],
        "trigger_mode": "always_last",
        "concurrency_id": "detector",
        "concurrency_limit": 1,
        "preprocess": False,
        "api_visibility": "private",
    }
    detected = gr.on(
        [inputs.picture.change, inputs.classes.submit, inputs.button.click],
        lambda *values: unpack(handlers.detect(*values)),
        [visit, inputs.picture, inputs.classes, *inputs.settings],
        show_progress="full",
        show_progress_on=[outputs.message, *outputs.panels],
        **common,
    )
    show_anew = {
        "fn": lambda *values: unpack(handlers.show(*values)),
        "inputs": [visit, inputs.picture, *inputs.settings],
        "show_progress": "hidden",
        **common,
    }
    moved = [
        inputs.threshold.change,
        inputs.top_k.change,
        inputs.class_thresholds.submit,
        inputs.class_thresholds.blur,
    ]
    gr.on(moved, **show_anew)
    # A threshold that was moved while a detection was asked for may have arrived before it.
    detected.then(**show_anew)


def _as_markdown(text: str) -> str:
    return re.sub(r"([^\w\s])", r"\\\1", text)


def _message(answer: Answer) -> str:
    text = escape(answer.message)
    return f'<div class="message {answer.kind}" role="status" aria-live="polite">{text}</div>'


# --- The server -----------------------------------------------------------------------------------


class OwnFilesOnly:
    """ASGI middleware: the server fetches nothing for anybody, and reads no endless request.

    Gradio passes on any URL behind ``file=`` and ``proxy=``, and downloads one that is given as the
    path of an upload.
    """

    def __init__(self, app: Any) -> None:
        """Wrap an application."""
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request, or refuse it with 403 or 413."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"].lower()
        if "proxy=" in path or re.search(r"file=\W*\w+:/", path):
            return await self._refuse(send, 403)
        if scope["method"] != "POST" or path.rstrip("/").endswith("/upload"):
            return await self.app(scope, receive, send)
        body = b""
        more = True
        while more:
            event = await receive()
            if event["type"] != "http.request":
                return None
            body += event.get("body", b"")
            more = event.get("more_body", False)
            if len(body) > MAX_REQUEST_BYTES:
                return await self._refuse(send, 413)
        try:
            foreign = _names_url(json.loads(body or b"null"))
        except (ValueError, RecursionError):
            foreign = False  # no JSON: Gradio's to refuse
        if foreign:
            return await self._refuse(send, 403)
        events = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def again() -> Any:
            return next(events, None) or await receive()

        return await self.app(scope, again, send)

    @staticmethod
    async def _refuse(send: Any, status: int) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def _names_url(value: Any) -> bool:
    """Whether a request has a file whose path is a URL."""
    if isinstance(value, dict):
        path = value.get("path")
        return (isinstance(path, str) and "://" in path) or any(map(_names_url, value.values()))
    return isinstance(value, list) and any(map(_names_url, value))


@contextlib.contextmanager
def gradio_in(folder: Path) -> Iterator[Any]:
    """Import Gradio so that it stays offline and writes into ``folder`` alone.

    Yields:
        The module. The environment is what it was afterwards.
    """
    settings = {
        "GRADIO_TEMP_DIR": str(folder),
        "GRADIO_EXAMPLES_CACHE": str(folder / "examples"),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_SHARE": "False",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        # Gradio asks its own server whether it is up; a proxy has no way to it.
        "NO_PROXY": ",".join(filter(None, [os.getenv("NO_PROXY"), "localhost,127.0.0.1,::1"])),
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield importlib.import_module("gradio")
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def launch(gr: Any, page: Any, host: str, port: int | None, limits: Limits) -> str:
    """Start to serve; returns at once. ``page.close()`` ends it.

    Returns:
        The page's URL.

    Raises:
        ValueError: Nothing can listen there.
    """
    middleware = importlib.import_module("starlette.middleware")  # comes with Gradio
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    try:
        _, url, _ = page.launch(
            server_name=host,
            server_port=_free_port(host) if port == 0 else port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            inbrowser=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            run_history=False,
            footer_links=[],
            show_error=False,
            max_file_size=limits.max_bytes,
            state_session_capacity=SESSIONS,
            app_kwargs={
                "middleware": [middleware.Middleware(OwnFilesOnly)],
                **dict.fromkeys(("docs_url", "redoc_url", "openapi_url")),
            },
            theme=gr.themes.Default(
                primary_hue="blue", font=fonts, font_mono=["ui-monospace", "monospace"]
            ),
            css=STYLE,
        )
    except OSError as error:
        where = f"{host}:{'any port' if port is None else port}"
        raise ValueError(f"--host, --port: cannot listen on {where} ({error})") from error
    return str(url)


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as server:
        return int(server.getsockname()[1])


class _Stop(BaseException):
    """A signal asks the server to end."""


@contextlib.contextmanager
def ending_on_signals() -> Iterator[None]:
    """Leave the block, cleaned up behind, on Ctrl-C, SIGTERM and a closed terminal."""
    numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if os.name == "posix" else [])]

    def stop(number: int, frame: FrameType | None) -> None:
        for each in numbers:  # nothing disturbs the cleaning up
            signal.signal(each, signal.SIG_IGN)
        raise _Stop

    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    except _Stop:
        logger.info("stopped")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def load_detectors(
    args: argparse.Namespace, text_cache: Path
) -> dict[str, OpenVocabularyPredictor]:
    """Load the detector and those to compare it with, by title.

    Args:
        args: The command line's.
        text_cache: Folder for the embeddings of the names that visitors type.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: An option or a file is wrong.
    """
    first = title_of(args.run or args.config_file or DEFAULT_RUN)
    compared = parse_compared(args.compare, first)
    private = ["MODEL.TEACHER.TEXT_CACHE_DIR", str(text_cache)]
    opts = [*args.opts, *private]
    predictors = {first: load_detector(args.run, args.config_file, opts, args.device)}
    for title, path in compared.items():
        predictors[title] = OpenVocabularyPredictor.from_checkpoint(
            path, device=args.device, opts=private
        )
    return predictors


def find_examples(paths: Sequence[str] | None) -> list[Path]:
    """Find the pictures to choose from; without paths, the miniature's.

    Raises:
        FileNotFoundError: One is not there.
    """
    if paths is None:
        folder = Path(os.getenv("DETECTRON2_DATASETS", "datasets"), MINIATURE)
        return sorted(folder.glob("*.jpg"))[:NUM_EXAMPLES]
    return [path for path in find_inputs(paths) if not is_video(path)] if paths else []


@contextlib.contextmanager
def serving(
    predictors: Mapping[str, OpenVocabularyPredictor],
    folder: Path,
    *,
    names: str = "",
    examples: Sequence[Path] = (),
    host: str = "127.0.0.1",
    port: int | None = None,
    limits: Limits | None = None,
) -> Iterator[str]:
    """Serve the page while inside the block.

    Args:
        predictors: By title; the first one is the main one.
        folder: An empty one, where everything is written.
        names: Class names that are there to begin with.
        examples: Pictures to choose from.
        host: Address to listen on.
        port: None is the first free one from ``FIRST_PORT`` on, 0 any free one.
        limits: What visitors may send.

    Yields:
        The page's URL.

    Raises:
        ValueError: Nothing can listen there.
    """
    limits = limits or Limits()
    downloads = folder / "downloads"
    downloads.mkdir()
    with gradio_in(folder) as gr:
        page = build_page(gr, Handlers(predictors, limits, downloads), names, examples)
        try:
            yield launch(gr, page, host, port, limits)
        finally:
            page.close(verbose=False)


def serve(args: argparse.Namespace) -> None:
    """Serve the page until a signal comes.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: An option or a file is wrong.
    """
    limits = Limits(args.max_megabytes * 1024**2, round(args.max_megapixels * 1e6), args.max_names)
    examples = find_examples(args.examples)
    with (
        ending_on_signals(),
        tempfile.TemporaryDirectory(prefix="hierkd_web_", ignore_cleanup_errors=True) as name,
    ):
        predictors = load_detectors(args, Path(name) / "text_embeddings")
        vocabulary = next(iter(predictors.values())).vocabulary
        served = Path(name) / "gradio"
        served.mkdir()
        with serving(
            predictors,
            served,
            names=", ".join(vocabulary) if len(vocabulary) <= args.max_names else "",
            examples=examples,
            host=args.host,
            port=args.port,
            limits=limits,
        ) as url:
            if args.host not in ("127.0.0.1", "localhost", "::1"):
                logger.warning("whoever can reach this machine can use the page")
            logger.info("Open %s - Ctrl-C ends it", url)
            threading.Event().wait()


def check_options(args: argparse.Namespace) -> None:
    """Raise ValueError if an option is out of range."""
    for name in ("max_megabytes", "max_megapixels", "max_names"):
        if not getattr(args, name) > 0:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} must be more than 0, got {getattr(args, name)}")
    if args.port is not None and not 0 <= args.port < 65536:
        raise ValueError(f"--port must be 0 to 65535, got {args.port}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; errors of the user's end it with a message and status 2."""
    parser = get_parser()
    args = parser.parse_args(argv)
    if importlib.util.find_spec("gradio") is None:
        parser.exit(2, f"web_demo.py: error: {INSTALL}\n")
    setup_logger(name="hierkd", abbrev_name="hierkd")
    try:
        check_options(args)
        serve(args)
    except (ValueError, FileNotFoundError, ConnectionError) as error:
        parser.exit(2, f"web_demo.py: error: {error}\n")


if __name__ == "__main__":
    main()
