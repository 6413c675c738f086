"""What is in a COCO file, counted before training: classes, boxes, captions, oddities."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate  # type: ignore[import-untyped]

__all__ = ["class_table", "count_contents", "short_line", "warnings_of"]

Report = dict[str, Any]

# A box with a shorter side has no point of the finest map (stride 8) in its middle even when the
# image is enlarged to twice its size. [ours]
_TINY_PX = 4.0
_FEW_BOXES = 10  # of a base class: less can hardly be learned. [ours]
_MAX_NAMED = 8


def count_contents(content: Mapping[str, Any], kind_of: Mapping[int, str]) -> Report:
    """Count what a file in COCO's layout holds.

    Args:
        content: With ``images``, ``annotations`` and ``categories``.
        kind_of: Category id -> "base", "novel", "all" (no split) or "ignored".

    Returns:
        JSON-able: ``images``, ``images_without_boxes``, ``boxes``, ``crowd``, ``tiny`` (a side
        below 4 px), ``outside`` (reaching out of the image by more than a pixel), ``without_area``,
        ``images_with_captions`` and ``classes``: a list of ``{"name", "kind", "boxes", "images"}``
        in id order.
    """
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    boxes: Counter[int] = Counter()
    pictures: dict[int, set[Any]] = defaultdict(set)
    counts: Counter[str] = Counter()
    for annotation in content["annotations"]:
        boxes[annotation["category_id"]] += 1
        pictures[annotation["category_id"]].add(annotation["image_id"])
        counts["crowd"] += bool(annotation.get("iscrowd", 0))
        counts.update(_oddities(annotation["bbox"], sizes.get(annotation["image_id"])))
    with_boxes = set().union(*pictures.values()) if pictures else set()
    return {
        "images": len(sizes),
        "images_without_boxes": len(sizes.keys() - with_boxes),
        "boxes": boxes.total(),
        **{key: counts[key] for key in ("crowd", "tiny", "outside", "without_area")},
        "images_with_captions": sum(bool(image.get("captions")) for image in content["images"]),
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


def _oddities(box: Any, size: tuple[int, int] | None) -> list[str]:
    """Which of "tiny", "outside" and "without_area" an XYWH box (px) is."""
    if size is None or len(box) != 4 or not all(isinstance(v, int | float) for v in box):
        return []  # the loader refuses these with their place
    x, y, width, height = box
    if width <= 0 or height <= 0:
        return ["without_area"]
    odd = ["tiny"] if min(width, height) < _TINY_PX else []
    if min(x, y) < -1 or x + width > size[0] + 1 or y + height > size[1] + 1:
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
    found = []

    def note(classes: Sequence[str], text: str) -> None:
        if classes:
            more = f" and {len(classes) - _MAX_NAMED} more" if len(classes) > _MAX_NAMED else ""
            found.append(f"{half}: {text}: {', '.join(classes[:_MAX_NAMED])}{more}")

    classes = report["classes"]
    wanted = [each for each in classes if each["kind"] != "ignored"]
    if half == "train":
        wanted = [each for each in wanted if each["kind"] == "base"]
    note([each["name"] for each in wanted if not each["boxes"]], "classes without a box")
    if half == "train":
        few = [f"{c['name']} ({c['boxes']})" for c in wanted if 0 < c["boxes"] < _FEW_BOXES]
        note(few, f"base classes with fewer than {_FEW_BOXES} boxes")
    ignored = [f"{c['name']} ({c['boxes']:,})" for c in classes if c["kind"] == "ignored"]
    note(ignored, "categories in neither list, left out with their boxes")
    names = [each["name"].lower() for each in classes]
    note(
        [each["name"] for each in classes if names.count(each["name"].lower()) > 1],
        "categories that differ in capitals alone",
    )
    texts = {
        "images_without_boxes": "images without any box",
        "without_area": "boxes without area (dropped)",
        "outside": "boxes reaching out of their image (clipped, or dropped)",
        "tiny": f"boxes with a side below {_TINY_PX:g} px",
        "crowd": "crowd regions",
    }
    found += [f"{half}: {report[key]:,} {text}" for key, text in texts.items() if report[key]]
    return found


def class_table(reports: Mapping[str, Report]) -> str:
    """Boxes (and images) of each class in each half, as a Markdown table.

    Args:
        reports: "train" and "val", where there are such.
    """
    kinds: dict[str, str] = {}
    cells: dict[str, dict[str, str]] = defaultdict(dict)
    for half, report in reports.items():
        for each in report["classes"]:
            kinds.setdefault(each["name"], each["kind"])
            cells[each["name"]][half] = f"{each['boxes']:,} ({each['images']:,})"
    order = {"base": 0, "novel": 1, "all": 2, "ignored": 3}
    rows = [
        [name, kind, *(cells[name].get(half, "–") for half in reports)]
        for name, kind in sorted(kinds.items(), key=lambda pair: order[pair[1]])
    ]
    headers = ["class", "kind", *(f"{half}: boxes (images)" for half in reports)]
    alignment = ("left", "left", *("right" for _ in reports))
    return str(
        tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=alignment)
    )
