"""The web page of ``tools/web_demo.py``: check what comes in, detect once, show often.

What a visitor does wrong is a ValueError whose text is shown to them; it holds no path of the
server. Texts of visitors are never taken for paths, and nothing here writes HTML.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
from detectron2.structures import Instances
from numpy.typing import NDArray
from PIL import Image as PILImage

from hierkd.data.mapper import problem_of_picture, read_picture
from hierkd.inference.detections import (
    DetectionFilter,
    as_records,
    read_class_thresholds,
    scale_boxes,
)
from hierkd.inference.detectors import icons_only
from hierkd.inference.drawing import Image, draw_instances, fit
from hierkd.inference.predictor import COMMAS, OpenVocabularyPredictor, check_typed

__all__ = [
    "SCRIPT",
    "STYLE",
    "Found",
    "Limits",
    "build_page",
    "detect",
    "parse_names",
    "read_upload",
    "show",
]

logger = logging.getLogger(__name__)

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # as Pillow calls them; browsers show all of them
_LARGEST_VIEW = 1280  # px, the longer side of the picture that boxes are drawn on. [ours]
# Of what visitors leave behind. [ours]
_SECONDS_KEPT = 3600
_WAITING = 50  # requests in the queue; further ones are turned away

# The result is seen without scrolling, on a phone before the inputs.
STYLE = """
h1 { font-size: 1.25rem !important; margin: 0 !important; }
:focus-visible { outline: 3px solid #1d4ed8 !important; outline-offset: 2px !important; }
[id^=panel_] img { max-height: 52vh; }
@media (max-width: 760px) { #answers { order: -1; } [id^=panel_] img { max-height: 45vh; } }
"""
# Gradio gives the examples no names that a screen reader could say.
SCRIPT = """() => {
  const name = () => document.querySelectorAll("#examples button:has(img)").forEach(button =>
    button.setAttribute("aria-label", "Example " + decodeURI(button.querySelector("img").src)
      .split("/").pop()));
  new MutationObserver(name).observe(document.body, {childList: true, subtree: true});
  name();
}"""
_SCROLL = "() => document.querySelector('#message').scrollIntoView({block: 'nearest'})"
_SCROLL_IF_WRONG = f"() => document.querySelector('#results')?.offsetParent || ({_SCROLL})()"

_HELLO = "Drop a picture."
_FAILED = "The server could not do this; its log says why."


@dataclass(frozen=True)
class Limits:
    """What a visitor may send. [ours]"""

    max_bytes: int = 20 * 1024**2  # of a picture file
    max_pixels: int = 25_000_000  # decoding takes some 3 bytes for each
    max_names: int = 200  # in a vocabulary
    max_examples: int = 20  # pictures of a class; each takes a pass of the teacher


@dataclass(frozen=True, eq=False)
class Found:
    """All detections in one picture, of each detector, before any is left out."""

    file_name: str  # as the visitor called it
    size: tuple[int, int]  # height and width, pixels
    vocabulary: tuple[str, ...]
    view: Image = field(repr=False)  # (h, w, 3), RGB, in the size it is drawn in
    instances: Mapping[str, Instances] = field(repr=False)  # by title


class Shown(NamedTuple):
    """What the page shows of :class:`Found`."""

    summary: str
    panels: list[Image]  # per detector, annotated, (h, w, 3), RGB
    table: list[list[str]]  # per detection: detector, class, score and box
    content: dict[str, Any]  # the keys are those of demo.py's detections.json


def parse_names(text: str, max_names: int) -> tuple[str, ...]:
    """Read class names between commas, semicolons, bars or line breaks; ValueError if unusable."""
    pieces = (" ".join(piece.split()) for piece in re.split(rf"{COMMAS}|[;|\r\n]", text or ""))
    names = [piece for piece in pieces if piece]
    if not names:
        raise ValueError("Type the classes to look for, separated by commas: cat, traffic cone.")
    if len(names) > max_names:
        raise ValueError(f"{len(names)} classes are too many: at most {max_names}.")
    check_typed(names, "the classes")
    return tuple(names)


def read_upload(path: str, max_pixels: int) -> NDArray[np.uint8]:
    """Read a picture that a visitor sent; its size is checked before it is decoded.

    Returns:
        (H, W, 3), BGR, upright.

    Raises:
        ValueError: It has too many pixels or bits, is of another format or broken.
    """
    try:
        with PILImage.open(path, formats=_FORMATS) as header:
            (width, height), too_deep = header.size, problem_of_picture(header)
    except PILImage.DecompressionBombError as error:
        raise ValueError(f"The picture is too large: at most {max_pixels} pixels.") from error
    except Exception as error:  # anything may come out of Pillow's decoders
        raise ValueError(
            "The file is not a picture that can be read: expected JPEG, PNG, WebP, GIF or BMP."
        ) from error
    if width * height > max_pixels:
        raise ValueError(
            f"The picture is too large: {width} × {height} pixels, at most {max_pixels} in all."
        )
    if too_deep:  # the only problem of these formats
        raise ValueError("The picture has 16 bits or more a channel: expected 8 bits.")
    try:
        return read_picture(path)
    except ValueError as error:
        logger.info("an upload cannot be decoded: %s", error)
        raise ValueError("The picture is broken: it cannot be decoded.") from error


def detect(
    predictors: Mapping[str, OpenVocabularyPredictor],
    path: str,
    names: str,
    limits: Limits,
    file_name: str,
    example_name: str = "",
    example_paths: Sequence[str] = (),
) -> Found:
    """Detect in an upload with each detector; no vocabulary outlasts the call.

    The class ``example_name`` is given by the pictures of ``example_paths``, beside the names.

    Raises:
        ValueError: A picture or the names cannot be used.
    """
    examples = _read_examples(example_name, example_paths, limits)
    # Examples need no names beside them.
    typed = parse_names(names, limits.max_names) if (names or "").strip() or not examples else ()
    vocabulary = tuple(dict.fromkeys([*typed, *examples]))
    image = read_upload(path, limits.max_pixels)
    instances = {
        title: predictor.predict(image, vocabulary=typed, examples=examples)
        for title, predictor in predictors.items()
    }
    view: Image = np.ascontiguousarray(image[:, :, ::-1])
    if max(view.shape) > _LARGEST_VIEW:
        view, _ = fit(view, _LARGEST_VIEW)
    return Found(file_name, (image.shape[0], image.shape[1]), vocabulary, view, instances)


def _read_examples(
    text: str, paths: Sequence[str], limits: Limits
) -> dict[str, list[NDArray[np.uint8]]]:
    """Read the class given by pictures; empty if there is neither a name nor a picture."""
    if not (text or "").strip() and not paths:
        return {}
    if not (text or "").strip():
        raise ValueError("Name the class of the example pictures.")
    if not paths:
        raise ValueError("Add example pictures of the class, or remove its name.")
    if len(paths) > limits.max_examples:
        raise ValueError(
            f"{len(paths)} example pictures are too many: at most {limits.max_examples}."
        )
    (name,) = parse_names(text, 1)
    try:
        return {name: [read_upload(path, limits.max_pixels) for path in paths]}
    except ValueError as error:
        raise ValueError(f"An example of {name!r}: {error}") from error


def show(found: Found, threshold: float, top_k: float, class_thresholds: str) -> Shown:
    """Choose and draw detections; no detector is asked.

    Raises:
        ValueError: A number is out of range, or a class is not in the vocabulary.
    """
    own = read_class_thresholds(re.split(r"[,;\r\n]", class_thresholds or ""))
    keep = DetectionFilter(threshold, int(top_k), own)
    kept = {title: keep(each, found.vocabulary) for title, each in found.instances.items()}
    records = {title: as_records(each, found.vocabulary) for title, each in kept.items()}
    content = {
        "file_name": found.file_name,
        "height": found.size[0],
        "width": found.size[1],
        "vocabulary": list(found.vocabulary),
        "detectors": list(kept),
        "confidence_threshold": threshold,
        "class_thresholds": own,
        "top_k": int(top_k),
        "detections": next(iter(records.values())),
    }
    if len(records) > 1:
        content["compared"] = dict(list(records.items())[1:])
    size = (found.view.shape[0], found.view.shape[1])
    panels = [
        draw_instances(
            found.view, scale_boxes(each, size[1] / found.size[1], size), found.vocabulary
        )
        for each in kept.values()
    ]
    table = [
        [title, row["class"], f"{row['score']:.1%}", ", ".join(f"{v:.0f}" for v in row["box_xyxy"])]
        for title, rows in records.items()
        for row in rows
    ]
    return Shown(_summary(found, kept), panels, table, content)


def _summary(found: Found, kept: Mapping[str, Instances]) -> str:
    lines = [
        f"{found.file_name}, {found.size[1]} × {found.size[0]} pixels, "
        f"{len(found.vocabulary)} class{'es' * (len(found.vocabulary) > 1)}."
    ]
    for title, instances in found.instances.items():
        line = f"{title}: {len(kept[title])} of {len(instances)} detections shown"
        if len(instances) and not len(kept[title]):
            best = as_records(instances[:1], found.vocabulary)[0]
            line += f"; the best one is {best['class']}, {best['score']:.1%}"
        lines.append(line)
    return "\n".join(lines)


def build_page(
    predictors: Mapping[str, OpenVocabularyPredictor],
    limits: Limits,
    names: str = "",
    examples: Sequence[Path] = (),
) -> gr.Blocks:
    """Lay out the page, with class names to begin with and pictures to choose from."""
    with gr.Blocks(
        title="HierKD", analytics_enabled=False, fill_width=True, delete_cache=(600, _SECONDS_KEPT)
    ) as page:
        state = gr.State(None, time_to_live=_SECONDS_KEPT)
        gr.Markdown("# Open-vocabulary detection\nDrop a picture and name what to look for.")
        if icons := icons_only(predictors):
            gr.Textbox(icons, show_label=False, container=False, elem_id="icons_only")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                inputs = _lay_out_inputs(limits, names, examples)
            with gr.Column(scale=5, min_width=320, elem_id="answers"):
                outputs = _lay_out_outputs(list(predictors))
        _connect(page, predictors, limits, state, inputs, outputs)
    page.queue(max_size=_WAITING)
    return page


def _lay_out_inputs(limits: Limits, names: str, examples: Sequence[Path]) -> list[Any]:
    """The picture, the names, the button; then three settings that need no new detection."""
    picture = gr.Image(
        str(examples[0]) if examples else None,
        label="Picture",
        sources=["upload", "clipboard"],
        buttons=["fullscreen"],
        height=220,
        placeholder=f"Drop a picture here, or click\nup to {limits.max_bytes / 1024**2:g} MB",
        elem_id="picture",
    )
    classes = gr.Textbox(
        names, label="Classes, separated by commas", max_lines=6, elem_id="classes"
    )
    button = gr.Button("Detect", variant="primary", elem_id="detect")
    threshold = gr.Slider(0, 1, 0.3, step=0.01, label="Score threshold", elem_id="threshold")
    with gr.Accordion("More", open=False, elem_id="more"):
        top_k = gr.Slider(1, 100, 100, step=1, label="At most, best first", elem_id="top_k")
        own = gr.Textbox(
            label="Thresholds of single classes",
            placeholder="dog=0.6, cup=0.2",
            elem_id="class_thresholds",
        )
        name = gr.Textbox(label="A class by examples: its name", elem_id="example_name")
        pictures = gr.File(
            label="Its example pictures",
            file_count="multiple",
            file_types=["image"],
            height=120,
            elem_id="example_pictures",
        )
    if examples:
        paths = [[str(path)] for path in examples]
        gr.Examples(paths, [picture], label="Or choose one", elem_id="examples")
    return [picture, classes, button, name, pictures, threshold, top_k, own]


def _lay_out_outputs(titles: Sequence[str]) -> list[Any]:
    """The message; the results, with a panel per detector, the table and the JSON."""
    message = gr.Textbox(_HELLO, show_label=False, container=False, elem_id="message")
    with gr.Column(visible=False, elem_id="results") as results:
        with gr.Row():
            panels = [
                gr.Image(
                    label=title,
                    show_label=len(titles) > 1,
                    format="png",
                    interactive=False,
                    buttons=["download", "fullscreen"],
                    alt_text=f"Detections of {title}",
                    elem_id=f"panel_{number}",
                )
                for number, title in enumerate(titles)
            ]
        table = gr.Dataframe(
            headers=["Detector", "Class", "Score", "Box: x0, y0, x1, y1 in pixels"],
            datatype="str",
            interactive=False,
            max_height=350,
            wrap=True,
            elem_id="table",
        )
        with gr.Accordion("JSON", open=False, elem_id="json"):
            code = gr.Code(language="json", interactive=False, show_label=False, max_lines=20)
    return [message, results, *panels, table, code]


def _connect(
    page: gr.Blocks,
    predictors: Mapping[str, OpenVocabularyPredictor],
    limits: Limits,
    state: gr.State,
    inputs: list[Any],
    outputs: list[Any],
) -> None:
    """Say what events do; each returns the new state, and a value for each of the outputs."""
    picture, names, button, example_name, example_pictures, *settings = inputs
    threshold, top_k, class_thresholds = settings

    def say(found: Found | None, text: str) -> list[Any]:
        """Nothing of an earlier picture stays."""
        return [found, text, gr.update(visible=False), *[None] * (len(outputs) - 2)]

    def answer_picture(
        upload: Mapping[str, Any] | None,
        names: str,
        example_name: str,
        example_pictures: Sequence[Mapping[str, Any]] | None,
        *settings: Any,
    ) -> list[Any]:
        if upload is None:
            return say(None, _HELLO)
        try:
            name = Path(upload.get("orig_name") or upload["path"]).name
            paths = [each["path"] for each in example_pictures or ()]
            found = detect(predictors, upload["path"], names, limits, name, example_name, paths)
        except ValueError as error:
            return say(None, str(error))
        except Exception:  # whatever it was, the old answer must not stay beside the new picture
            logger.exception("detecting has failed")
            return say(None, _FAILED)
        return answer_setting(found, *settings)

    def answer_setting(found: Found | None, *settings: Any) -> list[Any]:
        if found is None:
            return [gr.skip()] * (len(outputs) + 1)
        try:
            shown = show(found, *settings)
        except (ValueError, TypeError) as error:
            return say(found, str(error))
        content = json.dumps(shown.content, indent=1, ensure_ascii=False)
        return [found, shown.summary, gr.update(visible=True), *shown.panels, shown.table, content]

    # One after the other, in the order in which they came. The upload comes as Gradio stored it
    # (preprocess=False): Gradio would decode it without our limits.
    common: dict[str, Any] = {
        "outputs": [state, *outputs],
        "trigger_mode": "always_last",
        "concurrency_id": "detector",
        "concurrency_limit": 1,
        "preprocess": False,
        "api_visibility": "private",
    }
    of_picture = [page.load, picture.change, names.submit, button.click]
    of_picture += [example_name.submit, example_pictures.upload]
    asked = [picture, names, example_name, example_pictures, *settings]
    answered = gr.on(of_picture, answer_picture, asked, **common)
    answered.then(None, js=_SCROLL)
    of_settings = [threshold.change, top_k.change, class_thresholds.submit, class_thresholds.blur]
    common |= {"inputs": [state, *settings], "show_progress": "hidden"}
    gr.on(of_settings, answer_setting, **common).then(None, js=_SCROLL_IF_WRONG)
