"""What to look at before training: classes, boxes, pictures, and names that mislead CLIP."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate  # type: ignore[import-untyped]
from torch import Tensor

from hierkd.data.coco import clip_box
from hierkd.data.coco_json import shown
from hierkd.data.mapper import PictureState, look_at_pictures

__all__ = [
    "Finding",
    "check_embeddings",
    "check_pictures",
    "check_tokens",
    "class_table",
    "count_contents",
    "finding_table",
    "findings_of",
    "short_line",
]

Report = dict[str, Any]
_Found = dict[str, list[tuple[str, Any]]]  # kind -> (where, value) of each

# A box with a shorter side has no point of the finest map (stride 8) in its middle even when the
# image is enlarged to twice its size. [ours]
_TINY_PX = 4.0
_FEW_BOXES = 10  # of a base class: less can hardly be learned. [ours]
_MAX_NAMED, _MAX_EXAMPLES = 8, 2
# Two names whose text embeddings have at least this cosine are one class to CLIP. [ours: with
# ViT-B/32 no two of the 1,203 names of LVIS come closer than 0.965 ("book", "hardback book"), while
# two spellings of one name, "wine glass" and "wineglass", have 0.982]
_SAME_COSINE = 0.98
# Boxes are taken for XYXY if this share lies in its picture as XYXY, and that share only so. [ours]
_FIT_AS_XYXY, _ONLY_AS_XYXY = 0.95, 0.1


class _Kind(NamedTuple):
    what: str
    training: str  # what it does about it
    mend: str
    costs: bool = False  # labels, or the training


_KINDS = {
    "no_box": _Kind(
        "no box to train on: of base classes none, or crowd regions and unusable boxes alone",
        "train_net.py refuses",
        "draw boxes of base classes, with iscrowd 0",
        True,
    ),
    "not_evaluated": _Kind(
        "classes of a val part that has no object",
        "that part cannot be evaluated",
        "add pictures that show them, or leave the part out of DATASETS.TEST",
        True,
    ),
    "non_finite": _Kind("boxes that are no finite numbers", "drops them", "export them anew", True),
    "fractions": _Kind(
        "boxes that lie within 0..1: fractions of the picture?",
        "takes them for less than a pixel",
        "multiply them by width and height: bbox is in pixels",
        True,
    ),
    "xyxy": _Kind(
        "boxes that fit as [x0, y0, x1, y1] alone",
        "takes them for [x, y, width, height]: all boxes are wrong",
        "write x1 - x0 and y1 - y0",
        True,
    ),
    "without_area": _Kind("boxes without area", "drops them", "draw them anew", True),
    "outside": _Kind("boxes outside their picture", "drops them", "correct them or the size", True),
    "reaching": _Kind("boxes reaching out of their picture", "clips them", "none is needed"),
    "tiny": _Kind(
        f"boxes with a side below {_TINY_PX:g} px", "hardly learns them", "enlarge the pictures"
    ),
    "repeated": _Kind("boxes that repeat another one", "counts them twice", "remove one of two"),
    "crowd": _Kind("crowd regions", "ignores them", "iscrowd 0, if they are single objects"),
    "train_left_out": _Kind(
        "pictures without a box of a base class",
        "leaves them out, unless FILTER_EMPTY_ANNOTATIONS is False",
        "none, unless an object lacks its box",
    ),
    "val_left_out": _Kind(
        "pictures without a box of a base or novel class",
        "leaves them out of evaluation",
        "none, unless an object lacks its box",
    ),
    "unreadable": _Kind(
        "pictures that cannot be decoded",
        "train_net.py refuses",
        "replace them, or save them with 8 bits; SKIP_BROKEN_IMAGES True leaves training "
        "pictures out",
        True,
    ),
    "size": _Kind(
        "pictures of another size than the annotations say",
        "train_net.py refuses",
        "correct width and height, or save the pictures as they were annotated",
        True,
    ),
    "no_caption": _Kind(
        "pictures without a caption, beside others that have one",
        "train_net.py refuses, unless MODEL.GKD.LOSS_WEIGHT is 0",
        "write captions for them",
        True,
    ),
    "same_picture": _Kind("pictures that are there twice", "takes both", "keep one entry"),
    "shared": _Kind(
        "pictures that are in train and in val", "figures are too good", "remove them from one"
    ),
    "no_boxes": _Kind("classes without a box", "learns or scores nothing", "remove the name"),
    "few_boxes": _Kind(
        f"base classes with fewer than {_FEW_BOXES} boxes", "hardly learns them", "draw more"
    ),
    "ignored": _Kind(
        "categories in neither list, left out with their boxes",
        "leaves them out",
        "name them in base or novel, or leave it so",
    ),
    "grouping": _Kind(
        "grouping categories: the others' supercategory, without a box",
        "leaves them out",
        "none is needed",
    ),
    "capitals": _Kind(
        "categories that differ in capitals alone", "CLIP reads them as one", "join them"
    ),
    "long_prompts": _Kind("prompts longer than CLIP reads", "cuts them off", "use rename"),
    "empty_names": _Kind("names without anything that CLIP reads", "learns a blank", "use rename"),
    "same_to_clip": _Kind(
        "names that are nearly the same to CLIP (cosine of their embeddings)",
        "confuses them",
        "use rename, or join them",
    ),
}


@dataclass(frozen=True)
class Finding:
    """One kind of fault, or of what looks like one, in a half ("train", "val") or in the names."""

    half: str
    kind: str  # short name
    count: int
    examples: list[dict[str, Any]]  # "file", "where" in it, "value"
    what: str
    training: str
    mend: str
    costs: bool  # labels, or the training

    def __str__(self) -> str:
        """A line for a log."""
        values = ", ".join(str(each["value"]) for each in self.examples)
        return f"{self.half}: {self.count:,} {self.what}: {values}"


def _finding(half: str, kind: str, count: int, examples: Sequence[Mapping[str, Any]]) -> Finding:
    return Finding(half, kind, count, list(map(dict, examples)), **_KINDS[kind]._asdict())


def count_contents(
    content: Mapping[str, Any], kind_of: Mapping[int, str], half: str, path: str | os.PathLike[str]
) -> Report:
    """Count what a file in COCO's layout holds, and find what is odd about its boxes.

    Args:
        content: As :func:`hierkd.data.coco_json.read_annotations` returns it.
        kind_of: Category id -> "base", "novel", "all" (no split), "ignored" or "grouping".
        half: "train" or "val".
        path: Where it is from.

    Returns:
        JSON-able: ``file``, ``images``, ``boxes``, ``classes``: a list of ``{"name", "kind",
        "boxes", "images"}`` in id order, and ``findings``: kind -> ``{"count", "examples"}``.
    """
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    boxes: Counter[int] = Counter()
    pictures: dict[int, set[Any]] = defaultdict(set)
    found: _Found = defaultdict(list)
    seen: set[Any] = set()
    num_fit, only_xyxy, trainable = 0, [], 0
    for index, each in enumerate(content["annotations"]):
        category, image, box = each["category_id"], each["image_id"], each["bbox"]
        boxes[category] += 1
        pictures[category].add(image)
        odd = _oddities(box, *sizes[image])
        dropped = bool({"non_finite", "without_area", "outside"}.intersection(odd))
        if each.get("iscrowd", 0):
            odd.append("crowd")
        elif not dropped and kind_of[category] == "base":
            trainable += 1
        if not dropped and "fractions" not in odd:
            key = (image, category, *map(round, box))
            odd += ["repeated"] if key in seen else []
            seen.add(key)
        place = (f"annotations[{index}]", box)
        for kind in odd:
            found[kind].append(place)
        if fits := _fits_as_xyxy(box, *sizes[image]):
            num_fit += 1
        if fits and {"reaching", "outside"}.intersection(odd):
            only_xyxy.append(place)
    total = boxes.total()
    if num_fit >= _FIT_AS_XYXY * total and len(only_xyxy) > _ONLY_AS_XYXY * total:
        found["xyxy"] = only_xyxy
    kinds = set(kind_of.values())
    used = ("base",) if half == "train" else ("base", "novel")
    if "all" not in kinds:
        shows = set().union(*(pictures[k] for k, kind in kind_of.items() if kind in used))
        found[f"{half}_left_out"] = [
            (f"images[{index}]", image["file_name"])
            for index, image in enumerate(content["images"])
            if image["id"] not in shows
        ]
    if half == "train" and not trainable:
        found["no_box"] = [("annotations", f"{total} boxes")]
    return {
        "file": str(path),
        "images": len(sizes),
        "boxes": total,
        "classes": [
            {
                "name": category["name"],
                "kind": kind_of[category["id"]],
                "boxes": boxes[category["id"]],
                "images": len(pictures[category["id"]]),
            }
            for category in sorted(content["categories"], key=lambda each: int(each["id"]))
        ],
        "findings": {
            kind: {
                "count": len(places),
                "examples": [
                    {"file": str(path), "where": where, "value": shown(value)}
                    for where, value in places[:_MAX_EXAMPLES]
                ],
            }
            for kind, places in found.items()
            if places
        },
    }


def _oddities(box: Sequence[float], image_width: int, image_height: int) -> list[str]:
    """What is odd about an XYWH box (px)."""
    x, y, width, height = box
    _, verdict = clip_box(box, image_width, image_height)
    if verdict in ("non-finite", "without area"):
        return [verdict.replace("-", "_").replace(" ", "_")]
    if min(x, y) >= 0 and max(x + width, y + height) <= 1.01 and max(image_width, image_height) > 2:
        return ["fractions"]
    if verdict == "outside":
        return [verdict]
    odd = ["tiny"] if min(width, height) < _TINY_PX else []
    if min(x, y) < -1 or x + width > image_width + 1 or y + height > image_height + 1:
        odd.append("reaching")
    return odd


def _fits_as_xyxy(box: Sequence[float], image_width: int, image_height: int) -> bool:
    x0, y0, x1, y1 = box
    return -1 <= x0 < x1 <= image_width + 1 and -1 <= y0 < y1 <= image_height + 1


def check_pictures(
    records: Mapping[str, Sequence[Mapping[str, Any]]], limit: int | None = None
) -> list[Finding]:
    """Decode the pictures of each half as train_net.py does before it trains.

    Args:
        records: "train" and "val" -> detectron2 dataset dicts.
        limit: How many of each half to look at, from the first.
    """
    findings: list[Finding] = []
    halves_of: dict[bytes, set[str]] = defaultdict(set)
    for half, of_half in records.items():
        found: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        looked_at = of_half[:limit]
        for record, state in zip(
            looked_at, look_at_pictures(looked_at, with_digest=True), strict=True
        ):
            for kind, value in _problems(record, state, half, halves_of):
                found[kind].append(
                    {"file": record["file_name"], "where": f"image {record['image_id']}"}
                    | {"value": value}
                )
            if state.digest:
                halves_of[state.digest].add(half)
        findings += [
            _finding(half, kind, len(places), places[:_MAX_EXAMPLES])
            for kind, places in found.items()
        ]
    return findings


def _problems(
    record: Mapping[str, Any], state: PictureState, half: str, halves_of: Mapping[bytes, set[str]]
) -> Iterable[tuple[str, str]]:
    """Kind and value of what is wrong with a picture."""
    halves = halves_of.get(state.digest, set())
    name = Path(record["file_name"]).name
    for kind, value in (
        ("unreadable", state.broken),
        ("size", state.mismatch),
        ("same_picture", name if half in halves else ""),
        ("shared", name if halves - {half} else ""),
    ):
        if value:
            yield kind, value


def short_line(name: str, half: str, report: Report) -> str:
    """One line about a half of a dataset, for the log."""
    of_kind: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for each in report["classes"]:
        of_kind[each["kind"]].append(each)
    kinds = ", ".join(
        f"{sum(each['boxes'] for each in classes):,} boxes of {len(classes)} "
        f"{'' if kind == 'all' else kind + ' '}classes"
        for kind, classes in of_kind.items()
    )
    captions = f"; {report['images_with_captions']:,} with captions" if half == "train" else ""
    return f"{name} {half}: {report['images']:,} images{captions}; {kinds}"


def findings_of(half: str, report: Report) -> list[Finding]:
    """What a user should look at before training, of a half's annotation file."""
    classes = report["classes"]
    wanted = [each for each in classes if each["kind"] in ("base", "novel", "all")]
    few = []
    if half == "train":
        wanted = [each for each in wanted if each["kind"] == "base"]
        few = [f"{c['name']} ({c['boxes']})" for c in wanted if 0 < c["boxes"] < _FEW_BOXES]
    lower = Counter(each["name"].lower() for each in classes)
    scored = {each["kind"] for each in wanted if each["boxes"] or half == "train"}
    named = {
        "not_evaluated": [f"{c['name']} ({c['kind']})" for c in wanted if c["kind"] not in scored],
        "no_boxes": [c["name"] for c in wanted if not c["boxes"] and c["kind"] in scored],
        "few_boxes": few,
        "ignored": [f"{c['name']} ({c['boxes']:,})" for c in classes if c["kind"] == "ignored"],
        "grouping": [each["name"] for each in classes if each["kind"] == "grouping"],
        "capitals": [each["name"] for each in classes if lower[each["name"].lower()] > 1],
    }
    found = [_finding(half, kind, **each) for kind, each in report["findings"].items()]
    return found + _named(half, report["file"], named)


def _named(half: str, path: str, named: Mapping[str, Sequence[str]]) -> list[Finding]:
    """A finding per kind that has names, with the first few of them."""
    return [
        _finding(
            half,
            kind,
            len(names),
            [{"file": path, "where": "categories", "value": name} for name in names[:_MAX_NAMED]],
        )
        for kind, names in named.items()
        if names
    ]


def finding_table(findings: Sequence[Finding]) -> str:
    """Findings as a table for a terminal; those that cost labels come first."""
    rows = []
    for each in sorted(findings, key=lambda each: not each.costs):
        examples = [
            example["value"]
            if example["where"] == "categories"
            else f"{Path(example['file']).name} {example['where']}: {example['value']}"
            for example in each.examples
        ]
        mark = "!" if each.costs else ""
        name = f"{mark}{each.half}"
        texts = [each.what, "; ".join(examples), each.training, each.mend]
        rows.append([name, f"{each.count:,}", *texts])
    headers = ["", "count", "finding", "examples", "training", "to mend it"]
    widths = [None, None, 26, 34, 24, 26]
    table = tabulate(rows, headers, "simple_grid", disable_numparse=True, maxcolwidths=widths)
    return f"{table}\n! costs labels, or stops a training"


def class_table(reports: Mapping[str, Report]) -> str:
    """Boxes (and images) of each class in each half, "train" and "val", as a Markdown table."""
    kinds: dict[str, str] = {}
    cells: dict[str, dict[str, str]] = defaultdict(dict)
    for half, report in reports.items():
        for each in report["classes"]:
            kinds.setdefault(each["name"], each["kind"])
            cells[each["name"]][half] = f"{each['boxes']:,} ({each['images']:,})"
    rows = [
        [name, kind, *(cells[name].get(half, "–") for half in reports)]
        for order in ("base", "novel", "all", "ignored", "grouping")
        for name, kind in kinds.items()
        if kind == order
    ]
    headers = ["class", "kind", *(f"{half}: boxes (images)" for half in reports)]
    alignment = ("left", "left", *("right" for _ in reports))
    return str(tabulate(rows, headers, "github", disable_numparse=True, colalign=alignment))


def check_tokens(
    names: Sequence[str],
    templates: Sequence[str],
    count: Callable[[Sequence[str]], Sequence[int]],
    context_length: int,
) -> list[Finding]:
    """Names whose prompt is longer than CLIP reads, or that hold nothing it reads.

    Args:
        names: Of classes.
        templates: Prompts with one "{}".
        count: The teacher's tokeniser: texts -> the number of tokens of each.
        context_length: Tokens that the teacher reads.
    """
    longest = max(templates, key=len)
    prompts = count([longest.replace("{}", name) for name in names])
    nothing, *alone = count(["", *names])
    long = [name for name, number in zip(names, prompts, strict=True) if number > context_length]
    empty = [name for name, number in zip(names, alone, strict=True) if number <= nothing]
    return _named("names", "", {"long_prompts": long, "empty_names": empty})


def check_embeddings(names: Sequence[str], embeddings: Tensor) -> list[Finding]:
    """Pairs of the K ``names`` that are nearly the same to CLIP; ``embeddings``: (K, D), unit."""
    cosines = (embeddings @ embeddings.T).triu(diagonal=1)
    pairs = (cosines >= _SAME_COSINE).nonzero().tolist()
    pairs.sort(key=lambda pair: -float(cosines[pair[0], pair[1]]))
    found = [f"{names[i]} = {names[j]} ({cosines[i, j]:.3f})" for i, j in pairs]
    return _named("names", "", {"same_to_clip": found})
