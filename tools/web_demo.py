#!/usr/bin/env python
"""A web page: drop a picture, type class names, see boxes and scores.

    python tools/web_demo.py
    python tools/web_demo.py --compare "no distillation=output/miniature/atss"
    python tools/web_demo.py --config-file configs/hierkd_R50.yaml --opts MODEL.WEIGHTS model.pth

Without ``--run`` and ``--config-file`` it shows the detector that ``make demo`` trained, which
knows rendered icons only: photographs need a detector trained on photographs. It listens on this
machine alone, uses no other one, and writes into one temporary folder, which is removed at the end
(Ctrl-C). Needs Gradio: pip install -e '.[web]'. docs/demo.md says more.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import re
import signal
import socket
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hierkd.command import one_line_errors, run_command

if TYPE_CHECKING:
    from hierkd.reports.web_page import Limits

logger = logging.getLogger("hierkd.web_demo")

INSTALL = "the page needs Gradio 6: pip install 'gradio>=6,<7' (or, here: pip install -e '.[web]')"
MINIATURE = "miniature/test"  # under $DETECTRON2_DATASETS, where the example pictures come from
NUM_EXAMPLES = 6
SESSIONS = 100  # pages whose last detections are kept; the longest unused ones go first [ours]
MAX_REQUEST_BYTES = 1024**2  # of anything but an upload [ours]


def get_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("with which detector").add_argument
    add("--run", metavar="PATH", help="a training's folder or a checkpoint")
    add("--compare", nargs="+", default=[], metavar="[TITLE=]PATH", help="more, side by side")
    add("--config-file", metavar="YAML", help="config; default: the config.yaml of --run")
    add("--device", help="cpu, cuda, cuda:1, ...; default: the config's")
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="config overrides of the first detector, last on the line",
    )
    add = parser.add_argument_group("the page").add_argument
    add("--host", default="127.0.0.1", help="address to listen on; default: this machine alone")
    add("--port", type=int, help="default: 7860, or the next free one; 0 is any free one")
    add(
        "--examples",
        nargs="*",
        metavar="PATH",
        help="pictures, folders or globs to choose from on the page; default: "
        f"{NUM_EXAMPLES} of the miniature, if it is there",
    )
    add = parser.add_argument_group("what visitors may send").add_argument
    add("--max-megabytes", type=float, default=20, metavar="N",
        help="size of a picture file; default: %(default)s")  # fmt: skip
    add("--max-megapixels", type=float, default=25, metavar="N",
        help="millions of pixels of a picture; default: %(default)s")  # fmt: skip
    add("--max-names", type=int, default=200, metavar="N",
        help="class names; default: %(default)s")  # fmt: skip
    return parser


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a message and status 2 if an option is out of range, or Gradio is missing."""
    for name in ("max_megabytes", "max_megapixels", "max_names"):
        if not getattr(args, name) > 0:
            option = name.replace("_", "-")
            parser.error(f"--{option} must be more than 0, got {getattr(args, name)}")
    if args.port is not None and not 0 <= args.port < 65536:
        parser.error(f"--port must be 0 to 65535, got {args.port}")
    if importlib.util.find_spec("gradio") is None:
        parser.exit(2, f"web_demo.py: error: {INSTALL}\n")


def offline(folder: Path) -> dict[str, str]:
    """Environment in which Gradio stays offline and writes into ``folder`` alone."""
    return {
        "GRADIO_TEMP_DIR": str(folder),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_SHARE": "False",
        "HF_HUB_OFFLINE": "1",
        # Gradio asks its own server whether it is up; a proxy has no way to it.
        "NO_PROXY": ",".join(filter(None, [os.getenv("NO_PROXY"), "localhost,127.0.0.1,::1"])),
    }


def find_examples(paths: Sequence[str] | None) -> list[Path]:
    """Find the pictures to choose from; without paths, the miniature's.

    Raises:
        FileNotFoundError: One is not there.
    """
    from hierkd.inference.video import find_inputs, is_video

    if paths is None:
        folder = Path(os.getenv("DETECTRON2_DATASETS", "datasets"), MINIATURE)
        return sorted(folder.glob("*.jpg"))[:NUM_EXAMPLES]
    return [path for path in find_inputs(paths) if not is_video(path)]


async def own_files_only(request: Any, call_next: Any) -> Any:
    """Answer a request, or refuse it: the server fetches nothing for anybody, and reads no endless
    request.

    Gradio passes on any URL behind ``file=`` and ``proxy=``, and downloads one that is given as the
    path of an upload.
    """
    from starlette.responses import Response  # comes with Gradio

    path = request.url.path.lower()
    if "proxy=" in path or re.search(r"file=\W*\w+:/", path):
        return Response(status_code=403)
    if request.method == "POST" and not path.rstrip("/").endswith("/upload"):
        length = request.headers.get("content-length", "")
        if not length.isdigit() or int(length) > MAX_REQUEST_BYTES:
            return Response(status_code=413)
        try:
            content = json.loads(await request.body() or b"null")
        except (ValueError, RecursionError):
            return Response(status_code=400)
        if _names_url(content):
            return Response(status_code=403)
    return await call_next(request)


def _names_url(value: Any) -> bool:
    """Whether a request has a file whose path is a URL."""
    if isinstance(value, dict):
        path = value.get("path")
        return (isinstance(path, str) and "://" in path) or any(map(_names_url, value.values()))
    return isinstance(value, list) and any(map(_names_url, value))


def launch(page: Any, host: str, port: int | None, limits: Limits) -> str:
    """Start to serve; returns at once. ``page.close()`` ends it.

    Returns:
        The page's URL.

    Raises:
        ValueError: Nothing can listen there.
    """
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware

    from hierkd.reports.web_page import SCRIPT, STYLE

    if port == 0:
        with socket.create_server((host, 0)) as server:
            port = server.getsockname()[1]
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]  # none is loaded
    try:
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            ssr_mode=False,
            footer_links=[],
            css=STYLE,
            js=SCRIPT,
            show_error=False,
            max_file_size=limits.max_bytes,
            state_session_capacity=SESSIONS,
            app_kwargs={
                "middleware": [Middleware(BaseHTTPMiddleware, dispatch=own_files_only)],
                **dict.fromkeys(("docs_url", "redoc_url", "openapi_url")),
            },
            theme=gr.themes.Default(
                primary_hue="blue", font=fonts, font_mono=["ui-monospace", "monospace"]
            ),
        )
    except OSError as error:
        raise ValueError(f"--host, --port: cannot listen on {host}:{port} ({error})") from error
    return str(url)


def serve(args: argparse.Namespace, folder: Path) -> None:
    """Load the detectors and serve the page until a signal comes.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: An option or a file is wrong.
    """
    from hierkd.inference.detectors import load_detectors
    from hierkd.reports.web_page import Limits, build_page

    limits = Limits(
        round(args.max_megabytes * 1024**2), round(args.max_megapixels * 1e6), args.max_names
    )
    examples = find_examples(args.examples)
    predictors = load_detectors(
        args.run,
        args.config_file,
        args.opts,
        compared=args.compare,
        device=args.device,
        # What visitors type does not stay on the disk.
        opts_of_all=["MODEL.TEACHER.TEXT_CACHE_DIR", str(folder / "text_embeddings")],
    )
    names = next(iter(predictors.values())).vocabulary
    start = ", ".join(names) if len(names) <= limits.max_names else ""
    page = build_page(predictors, limits, start, examples)
    try:
        url = launch(page, args.host, args.port, limits)
        if args.host not in ("127.0.0.1", "localhost", "::1"):
            logger.warning("whoever can reach this machine can use the page")
        logger.info("Open %s - Ctrl-C ends it", url)
        threading.Event().wait()
    finally:
        page.close(verbose=False)


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = get_parser()
    args = parser.parse_args(argv)
    check_options(parser, args)
    for name in ("SIGTERM", "SIGHUP"):  # as Ctrl-C: the folder goes
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="hierkd_web_", ignore_cleanup_errors=True) as folder:
        os.environ.update(offline(Path(folder)))
        from detectron2.utils.logger import setup_logger

        setup_logger(name="hierkd", abbrev_name="hierkd")
        try:
            serve(args, Path(folder))
        except KeyboardInterrupt:
            logger.info("stopped")


if __name__ == "__main__":
    run_command(main)
