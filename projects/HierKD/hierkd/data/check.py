"""What to look at before training: classes, boxes, captions, oddities, names that mislead CLIP."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tabulate import tabulate  # type: ignore[import-untyped]
from torch import Tensor

__all__ = [
    "check_embeddings",
    "check_tokens",
    "class_table",
    "count_contents",
    "short_line",
    "warnings_of",
]

Report = dict[str, Any]

# A box with a shorter side has no point of the finest map (stride 8) in its middle even when the
# image is enlarged to twice its size. [ours]
_TINY_PX = 4.0
_FEW_BOXES = 10  # of a base class: less can hardly be learned. [ours]
_MAX_NAMED = 8
# Two names whose text embeddings have at least this cosine are one class to CLIP. [ours: with
# ViT-B/32 no two of the 1,203 names of LVIS come closer than 0.965 ("book", "hardback book"), while
# two spellings of one name, "wine glass" and "wineglass", have 0.982]
_SAME_COSINE = 0.98
_ODDITIES = {  # key of a report -> what it counts
    "images_without_boxes": "images without any box",
    "without_area": "boxes without area (dropped)",
    "non_finite": "boxes that are no finite numbers (dropped)",
    "outside": "boxes reaching out of their image (clipped, or dropped)",
    "tiny": f"boxes with a side below {_TINY_PX:g} px",
    "crowd": "crowd regions",
}


def count_contents(content: Mapping[str, Any], kind_of: Mapping[int, str]) -> Report:
    """Count what a file in COCO's layout holds.

    Args:
        content: As :func:`hierkd.data.coco_json.read_annotations` returns it.
        kind_of: Category id -> "base", "novel", "all" (no split) or "ignored".

    Returns:
        JSON-able: ``images``, ``boxes``, the keys of ``_ODDITIES`` and ``classes``: a list of
        ``{"name", "kind", "boxes", "images"}`` in id order.
    """
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    boxes: Counter[int] = Counter()
    pictures: dict[int, set[Any]] = defaultdict(set)
    counts: Counter[str] = Counter()
    for annotation in content["annotations"]:
        boxes[annotation["category_id"]] += 1
        pictures[annotation["category_id"]].add(annotation["image_id"])
        counts["crowd"] += annotation.get("iscrowd", 0)
        counts.update(_oddities(annotation["bbox"], *sizes[annotation["image_id"]]))
    counts["images_without_boxes"] = len(sizes.keys() - set().union(*pictures.values()))
    return {
        "images": len(sizes),
        "boxes": boxes.total(),
        **{key: counts[key] for key in _ODDITIES},
        "classes": [
            {
                "name": category["name"],
                "kind": kind_of[category["id"]],
                "boxes": boxes[category["id"]],
                "images": len(pictures[category["id"]]),
            }
            for category in sorted(content["categories"], key=lambda each: int(each["id"]))
        ],
    }


def _oddities(box: Sequence[float], image_width: int, image_height: int) -> list[str]:
    """What is odd about an XYWH box (px)."""
    x, y, width, height = box
    if not all(map(math.isfinite, box)):
        return ["non_finite"]
    if width <= 0 or height <= 0:
        return ["without_area"]
    odd = ["tiny"] if min(width, height) < _TINY_PX else []
    if min(x, y) < -1 or x + width > image_width + 1 or y + height > image_height + 1:
        odd.append("outside")
    return odd


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


def warnings_of(half: str, report: Report) -> list[str]:
    """What a user should look at before training, each a sentence."""
    classes = report["classes"]
    wanted = [each for each in classes if each["kind"] != "ignored"]
    few = []
    if half == "train":
        wanted = [each for each in wanted if each["kind"] == "base"]
        few = [f"{c['name']} ({c['boxes']})" for c in wanted if 0 < c["boxes"] < _FEW_BOXES]
    lower = Counter(each["name"].lower() for each in classes)
    findings = {
        "classes without a box": [each["name"] for each in wanted if not each["boxes"]],
        f"base classes with fewer than {_FEW_BOXES} boxes": few,
        "categories in neither list, left out with their boxes": [
            f"{c['name']} ({c['boxes']:,})" for c in classes if c["kind"] == "ignored"
        ],
        "categories that differ in capitals alone": [
            each["name"] for each in classes if lower[each["name"].lower()] > 1
        ],
    }
    counted = [f"{report[key]:,} {text}" for key, text in _ODDITIES.items() if report[key]]
    return [f"{half}: {text}" for text in _listed(findings) + counted]


def _listed(findings: Mapping[str, Sequence[str]]) -> list[str]:
    """A sentence per finding that has names, with the first few of them."""
    more = {t: f" and {len(n) - _MAX_NAMED} more" for t, n in findings.items() if n[_MAX_NAMED:]}
    return [
        f"{text}: {', '.join(names[:_MAX_NAMED])}{more.get(text, '')}"
        for text, names in findings.items()
        if names
    ]


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
        for order in ("base", "novel", "all", "ignored")
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
) -> list[str]:
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
    return _listed(
        {
            f"prompts longer than the {context_length} tokens that CLIP reads": [
                name for name, number in zip(names, prompts, strict=True) if number > context_length
            ],
            "names without anything that CLIP reads": [
                name for name, number in zip(names, alone, strict=True) if number <= nothing
            ],
        }
    )


def check_embeddings(names: Sequence[str], embeddings: Tensor) -> list[str]:
    """Pairs of the K ``names`` that are nearly the same to CLIP; ``embeddings``: (K, D), unit."""
    cosines = (embeddings @ embeddings.T).triu(diagonal=1)
    pairs = (cosines >= _SAME_COSINE).nonzero().tolist()
    pairs.sort(key=lambda pair: -float(cosines[pair[0], pair[1]]))
    found = [f"{names[i]} = {names[j]} ({cosines[i, j]:.3f})" for i, j in pairs]
    return _listed({"names that are nearly the same to CLIP (cosine of their embeddings)": found})
