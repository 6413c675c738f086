"""What the report of a run shows, and that of ``make demo``."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances

from hierkd.config import add_hierkd_config
from hierkd.evaluation.heat_maps import score_heat_maps
from hierkd.inference.drawing import Image, SheetRow, draw_sheet, save_picture
from hierkd.inference.predictor import OpenVocabularyPredictor
from hierkd.load_config import load_config
from hierkd.reports.charts import draw_curves, draw_heat_map_sheet
from hierkd.reports.gallery import (
    COLORS,
    CORRECT,
    UNCOUNTED,
    Sample,
    best_sample_per_class,
    build_samples,
    choose_in_turn,
    choose_test_dataset,
    draw_sample,
    judged_classes,
    keep_best,
    legend_of,
)
from hierkd.reports.metrics import Curve
from hierkd.reports.page import (
    Bar,
    Card,
    Cell,
    Figure,
    Page,
    Picture,
    Section,
    Table,
    data_uri,
    embedded,
    write_page,
)
from hierkd.reports.run_record import Evaluation, RunFolder, read_run

__all__ = ["describe_run", "write_demo_report"]

logger = logging.getLogger(__name__)

# What a scalar of metrics.json is, in the order of the report; docs/monitoring.md says more.
_TITLES = {
    "total_loss": "all losses together",
    "loss_cls": "classification (Eq. 1)",
    "loss_box_reg": "boxes (GIoU)",
    "loss_iou": "box quality (IoU branch)",
    "loss_centerness": "box quality (centre-ness)",
    "loss_ikd": "instance-level distillation (Eq. 2)",
    "loss_gkd": "global-level distillation",
    "loss_gkd_image": "global-level distillation, by image (Eq. 5)",
    "loss_gkd_caption": "global-level distillation, by caption (Eq. 5)",
    "lr": "learning rate",
    "tau_c": "τ_c, factor of the class cosines (Eq. 1)",
    "tau_m": "τ_m, factor of the match scores (Eq. 4)",
    "cls_weight": "learned weight of the classification loss",
    "background_start_cosine": "background: cosine with its start",
    "background_class_cosine": "background: cosine with the nearest class",
    "num_pos_anchors": "positive points per image",
    "iou_pos_anchors": "IoU of the positives' boxes with their objects",
    "num_distilled_regions": "distilled points per image (§3.2)",
    "iou_distilled_regions": "IoU of the boxes good enough to distil",
    "time": "seconds per iteration",
    "data_time": "seconds per iteration spent waiting for data",
    "rank_data_time": "seconds waiting for data, slowest process",
}
_SPEED = ("time", "data_time", "rank_data_time")
# Of these the change matters, not the distance from zero.
_FITTED = ("tau_", "cls_weight", "background_", "iou_")

_METRICS = ("AP50", "AR50", "AP", "AP75", "APs", "APm", "APl")
_GROUPS = ("novel", "base", "all")
# What a dataset tests, told from the groups of its vocabulary; in the order of the tables.
_PROTOCOLS = {("novel",): "ZSD", ("base",): "base alone", _GROUPS: "GZSD"}
_FIGURES_CAPTION = (
    "Percent. AP50: average precision at an overlap (IoU) of 0.5. AR50: share of the objects found "
    "at that overlap. ZSD: only the novel names are asked for. GZSD: all names compete."
)
_PER_CLASS = "AP50-"
_BEST_PX = 360  # of pictures that stand four in a row. [ours]


# ------------------------------------------------------------------------------------- any run


def describe_run(run: RunFolder, *, num_pictures: int = 12) -> Page:
    """Describe a run.

    Args:
        run: What it is about.
        num_pictures: Test pictures with the detections of the last evaluation, at most; 0 is none.
    """
    pictures, notes = Section(), list(run.notes)
    if num_pictures > 0 and run.config:
        try:
            pictures = _pictures_section(*_find_samples(run.path, num_pictures))
        # whatever a folder, a dataset and a checkpoint can be wrong in: the rest can still be told
        except Exception as error:
            logger.warning("%s: no pictures: %s", run.path, error)
            notes.append(f"There are no pictures: {error}")
    sections = [
        _summary_section(run, notes),
        _figures_section(run),
        *_curve_sections(run.metrics.curves),
        pictures,
        _classes_section(run),
        _provenance_section(run),
        _config_section(run),
    ]
    shown = [each for each in sections if each != Section()]
    return Page(f"HierKD: {run.name}", shown)


def _summary_section(run: RunFolder, notes: Sequence[str]) -> Section:
    facts: dict[str, Any] = {"State": _state(run)}
    if run.starts:
        facts["Begun"] = run.starts[0]["date"]
        if len(run.starts) > 1:
            facts["Starts"] = f"{len(run.starts)}, the last one {run.starts[-1]['date']}"
        commits = dict.fromkeys(each["commit"] or "unknown" for each in run.starts)
        facts["Commit"] = " → ".join(commits)
    iterations, medians = run.metrics.curves.get("time", ([], []))
    if iterations:  # each median is of the steps since the one before
        seconds = np.nansum(np.diff([-1, *iterations]) * medians)
        facts["Training time"] = f"{timedelta(seconds=round(seconds))}, without evaluations"
    keys = {"Trained on": "DATASETS.TRAIN", "Tested on": "DATASETS.TEST", "Seed": "SEED"}
    keys["Images per step"] = "SOLVER.IMS_PER_BATCH"
    config = _flat(run.config)
    facts |= {title: _shown(config[key]) for title, key in keys.items() if key in config}
    return Section(cards=_cards(run), facts=facts, notes=notes)


def _cards(run: RunFolder) -> list[Card]:
    """At most four: AP50 of novel and of base classes in each test."""
    cards = [
        Card(f"{group} AP50, {protocol}", figures[f"{group}/AP50"], dataset)
        for protocol, dataset, figures in _by_protocol(run.figures)
        for group in _groups(figures)
        if f"{group}/AP50" in figures and (protocol != "GZSD" or group != "all")
    ]
    return cards[:4]


def _state(run: RunFolder) -> str:
    done = run.num_iterations
    if done is None:
        return "evaluated only" if run.evaluations else "no step was recorded"
    total = _flat(run.config).get("SOLVER.MAX_ITER")
    if done == total or (run.path / "model_final.pth").is_file():
        return f"finished, {done} iterations"
    of = f" of {total}" if total is not None else ""
    last = run.path / "last_checkpoint"
    kept = f"; last checkpoint {last.read_text(errors='replace')}" if last.is_file() else ""
    return f"unfinished, at least {done}{of} iterations{kept}"


def _shown(value: Any) -> str:
    """A value of a config or of a record, as text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(each)}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(_shown, value)) or "none"
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


# ----------------------------------------------------------------------------------------- figures


def _groups(figures: Mapping[str, float]) -> list[str]:
    """The groups of classes that figures tell of: those of an evaluator here, then others."""
    found = {name.split("/")[0] for name in figures if "/" in name}
    return [*(g for g in _GROUPS if g in found), *sorted(found - set(_GROUPS))]


def _by_protocol(
    figures: Mapping[str, Mapping[str, float]],
) -> list[tuple[str, str, Mapping[str, float]]]:
    """What is tested, the dataset and its figures, in the order of the tables."""
    order = [*_PROTOCOLS.values(), "–"]
    found = [(_PROTOCOLS.get(tuple(_groups(f)), "–"), name, f) for name, f in figures.items()]
    return sorted(found, key=lambda each: order.index(each[0]))


def _figures_section(run: RunFolder) -> Section:
    if not run.evaluations:
        return Section("Figures", text="Nothing was evaluated yet.")
    first, *others = run.evaluations
    return Section(
        "Figures",
        text=first.title,
        table=_figures_table(first),
        caption=f"{_FIGURES_CAPTION} AP: mean over overlaps from 0.5 to 0.95; APs, APm, APl: of "
        "small, medium and large objects. A dash: there are no such objects.",
        folded=[Section(each.title, table=_figures_table(each)) for each in others],
    )


def _figures_table(evaluation: Evaluation) -> Table:
    """A row per dataset and group of classes; figures of no group are in a row of their own."""
    rows: dict[tuple[str, str, str], dict[str, float]] = {}
    for protocol, dataset, figures in _by_protocol(evaluation.figures):
        rows |= {(protocol, group, dataset): {} for group in _groups(figures)}
        for name, value in figures.items():
            if not name.startswith(_PER_CLASS):
                group, _, metric = name.rpartition("/")
                rows.setdefault((protocol, group, dataset), {})[metric] = value
    found = {metric for of_row in rows.values() for metric in of_row}
    metrics = [*(m for m in _METRICS if m in found), *sorted(found - set(_METRICS))]
    cells = [[*row, *(values.get(m) for m in metrics)] for row, values in rows.items()]
    return Table(["Test", "Classes", "Dataset", *metrics], cells, num_texts=3)


def _classes_section(run: RunFolder) -> Section:
    """AP50 of each class, in each dataset of the last evaluation; novel classes first."""
    columns: dict[str, dict[str, float]] = {}
    kinds: dict[str, str] = {}
    for _, dataset, figures in _by_protocol(run.figures):
        names = [name for name in figures if name.startswith(_PER_CLASS)]
        if names:
            columns[dataset] = {n.removeprefix(_PER_CLASS): figures[n] for n in names}
        if _groups(figures) in (["base"], ["novel"]):
            kinds |= dict.fromkeys(columns.get(dataset, ()), _groups(figures)[0])
    names = sorted({name for column in columns.values() for name in column})
    rows: list[list[Cell]] = []
    for name in sorted(names, key=lambda name: ("novel", "base", "–").index(kinds.get(name, "–"))):
        color = COLORS[CORRECT if kinds.get(name) == "novel" else UNCOUNTED]
        bars = [Bar(column.get(name), color) for column in columns.values()]
        rows.append([name, kinds.get(name, "–"), *bars])
    table = Table(["Class", "Kind", *columns], rows)
    return Section("AP50 of each class", table=table) if rows else Section()


# ------------------------------------------------------------------------------------------ curves


def _curve_sections(curves: Mapping[str, Curve]) -> list[Section]:
    """Curves by subject, a figure per scalar."""
    scalars = {name for name in curves if name.count("/") < 2} - {"eta_seconds"}
    if curves.get("rank_data_time") == curves.get("data_time"):
        scalars.discard("rank_data_time")  # there was one process
    figures: dict[str, list[Figure]] = {"losses": [], "learned": [], "speed": []}
    for name in [*(n for n in _TITLES if n in scalars), *sorted(scalars - _TITLES.keys())]:
        kind = "losses" if name.startswith(("loss_", "total_")) else "learned"
        figures["speed" if name in _SPEED else kind].append(
            _curves(
                _TITLES.get(name, name),
                {"": curves[name]},
                from_zero=not name.startswith(_FITTED),
            )
        )
    medians = "medians over up to 20 iterations."
    found = {
        "Losses": (figures["losses"], f"Weighted as in Eq. 6; {medians}"),
        "Average precision over time": (
            _precision_curves(curves),
            "AP50 in percent, of every evaluation in training.",
        ),
        "What is learned beside the network": (
            figures["learned"],
            "The factors τ_c and τ_m, the background's embedding, how many points are positive and "
            "distilled, and other scalars. What is healthy: docs/monitoring.md.",
        ),
        "Speed": (figures["speed"], medians.capitalize()),
    }
    return [
        Section(title, figures=shown, columns=3, caption=caption)
        for title, (shown, caption) in found.items()
        if shown
    ]


def _precision_curves(curves: Mapping[str, Curve]) -> list[Figure]:
    """A figure per dataset, with a line per group of classes, if there are two points."""
    lines: dict[str, dict[str, Curve]] = {}
    for scalar, curve in curves.items():
        dataset, *rest = scalar.split("/")
        if len(rest) == 3 and rest[2] == "AP50" and len(curve[0]) > 1:
            lines.setdefault(dataset, {})[rest[1]] = curve
    return [_curves(dataset, of_dataset) for dataset, of_dataset in lines.items()]


def _curves(title: str, lines: Mapping[str, Curve], *, from_zero: bool = True) -> Figure:
    svg = draw_curves(lines, from_zero=from_zero)
    size = re.search(rb'viewBox="0 0 (\d+)[\d.]* (\d+)', svg)
    shape = (int(size[1]), int(size[2])) if size else None
    return Figure([Picture(data_uri("image/svg+xml", svg), title, size=shape)], caption=title)


# ---------------------------------------------------------------------------------------- pictures


def _find_samples(folder: Path, count: int) -> tuple[list[Sample], str]:
    """Test pictures with what the last evaluation has found in them, and where these come from."""
    cfg = load_config(str(folder / "config.yaml"))
    registered = [name for name in cfg.DATASETS.TEST if name in DatasetCatalog.list()]
    dataset_name = choose_test_dataset(registered)
    if dataset_name is None:
        raise ValueError("none of the datasets in DATASETS.TEST is registered")
    vocabulary = list(MetadataCatalog.get(dataset_name).thing_classes)
    judged = judged_classes(dataset_name)
    records = choose_in_turn(DatasetCatalog.get(dataset_name), vocabulary, judged, count)
    detect = _saved_detections(folder, dataset_name)
    samples = keep_best(build_samples(records, detect, vocabulary, judged))
    return samples, f"{dataset_name}; detections of its last evaluation"


def _saved_detections(folder: Path, dataset_name: str) -> Callable[[Any, Image], Instances]:
    """Look up what a run's evaluation has written, in COCO's results format."""
    path = folder / "inference" / dataset_name / "coco_instances_results.json"
    if not path.is_file():
        raise FileNotFoundError(f"no evaluation has left {path}")
    positions = MetadataCatalog.get(dataset_name).thing_dataset_id_to_contiguous_id
    of_images: dict[Any, list[Mapping[str, Any]]] = {}
    for result in json.loads(path.read_bytes()):
        of_images.setdefault(result["image_id"], []).append(result)

    def detect(record: Any, image: Image) -> Instances:
        results = of_images.get(record["image_id"], [])
        boxes = torch.tensor([r["bbox"] for r in results], dtype=torch.float32).reshape(-1, 4)
        return Instances(
            image.shape[:2],
            pred_boxes=Boxes(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)),
            scores=torch.tensor([float(r["score"]) for r in results]),
            pred_classes=torch.tensor([positions[r["category_id"]] for r in results]).long(),
        )

    return detect


def _pictures_section(samples: Sequence[Sample], source: str) -> Section:
    figures = []
    for sample in samples:
        names = sorted({box.class_name for box in sample.truth if box.verdict == CORRECT})
        pictures = [
            embedded(draw_sample(sample, boxes), label, label)
            for label, boxes in (("ground truth", sample.truth), ("detected", sample.detections))
        ]
        caption = f"{Path(sample.file_name).name}: {', '.join(names)}"
        figures.append(Figure(pictures, caption=caption))
    return Section(
        "Ground truth beside detections",
        legend=legend_of(samples),
        figures=figures,
        caption=f"{source}. The pictures show the novel classes in turn and are chosen by their "
        "ground truth alone; without novel classes, all classes count as such. All names compete. "
        "Drawn are the best detections of novel and of base classes, of each as many as the "
        "picture has objects, so one that is missed leaves room for a wrong one. A detection is "
        "correct if its class is right and its overlap with an object not yet found is at least "
        "0.5.",
    )


# ------------------------------------------------------------------------------ where it comes from


def _provenance_section(run: RunFolder) -> Section:
    if not run.starts:
        return Section()
    *earlier, last = [
        {name.capitalize(): _shown(value) for name, value in start.items()} for start in run.starts
    ]
    folded = [
        Section(f"Start {count} of {len(run.starts)}", facts=facts)
        for count, facts in enumerate(earlier, start=1)
    ]
    return Section("Where it ran", facts=last, folded=folded)


def _config_section(run: RunFolder) -> Section:
    """All keys that have not their default, and the whole file."""
    if not run.config_text:
        return Section()
    cfg = get_cfg()
    add_hierkd_config(cfg)
    defaults = _flat(yaml.safe_load(cfg.dump()))
    rows = [
        [key, _shown(value), _shown(defaults.get(key, "no such key"))]
        for key, value in sorted(_flat(run.config).items())
        if key not in defaults or value != defaults[key]
    ]
    return Section(
        "Config",
        text="What differs from the defaults of detectron2 and HierKD:",
        table=Table(["Key", "Value", "Default"], rows, num_texts=3),
        folded=[Section("The whole config", code=run.config_text)],
    )


def _flat(config: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key to value."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


# --------------------------------------------------------------------------------------- make demo


def write_demo_report(
    path: str | os.PathLike[str],
    figures: Sequence[tuple[str, str, float | None, float | None, float | None]],
    facts: Mapping[str, Any],
    *,
    run_dir: str | os.PathLike[str],
    predictor: OpenVocabularyPredictor,
    dataset_name: str,
    stored: Mapping[str, Sequence[float]],
    num_pictures: int = 12,
) -> None:
    """Write the report that ``make demo`` ends with, and ``overview.jpg`` beside it.

    Args:
        path: The HTML file.
        figures: As from :func:`hierkd.experiments.results.summary_rows`: protocol, classes, AP50,
            AR50 and the upper bound's AP50.
        facts: How it was made.
        run_dir: The training's folder, with the detections of its last evaluation.
        predictor: The trained detector; its vocabulary is put back afterwards.
        dataset_name: Test pictures: a registered dataset with base and novel classes.
        stored: Other recipes to their AP50, measured before: of ZSD's novel classes, and of GZSD's
            novel, base and all classes.
        num_pictures: How many pictures show ground truth beside detections.

    Raises:
        FileNotFoundError: There is no run in ``run_dir``, or it was not evaluated on the dataset.
    """
    run = read_run(run_dir)
    vocabulary = list(MetadataCatalog.get(dataset_name).thing_classes)
    novel = judged_classes(dataset_name)
    records = DatasetCatalog.get(dataset_name)
    detect = _saved_detections(run.path, dataset_name)
    samples = keep_best(build_samples(records, detect, vocabulary, novel))
    best = best_sample_per_class(samples, novel)
    panels = {name: _draw_best(sample, name) for name, sample in best.items()}
    chosen = [records.index(r) for r in choose_in_turn(records, vocabulary, novel, num_pictures)]
    shown = [samples[index] for index in chosen]
    with predictor.model.vocabulary(vocabulary):
        heat_maps = [_heat_maps(predictor, sample, novel) for sample in shown[:3]]
    page = Page(
        "Found by name, never boxed in training",
        [
            _best_section(panels, novel),
            Section(
                "The figures",
                cards=_cards(run),
                table=Table(["Test", "Classes", "AP50", "AR50", "Upper bound AP50"], figures),
                caption=f"{_FIGURES_CAPTION} On the untouched test split. Upper bound: the true "
                "boxes, each named once, by the CLIP that taught the detector.",
            ),
            _stored_section(figures, stored),
            Section(
                text="This is a miniature: rendered icons on small pictures, a tiny CLIP trained "
                "on the same world (novel classes included, as for the real CLIP) and a short "
                "training on a CPU. It shows the method at work; its figures say nothing about "
                "COCO. Runs that differ in nothing but the seed differ by a few points."
            ),
            _pictures_section(shown, dataset_name),
            Section(
                "Where each level sees a class",
                text="The score of one novel class at every point, for each level of the feature "
                "pyramid; all names compete. Fine levels answer for small objects, coarse ones for "
                "large. After Fig. 4 of the paper.",
                figures=heat_maps,
                columns=1,
            ),
            _classes_section(run),
            *_curve_sections(run.metrics.curves)[:2],
            Section("How it was made", facts={k.capitalize(): _shown(v) for k, v in facts.items()}),
            _config_section(run),
        ],
        lead=f"This detector was trained with boxes of {len(vocabulary) - len(novel)} classes. The "
        f"{len(novel)} classes below never had a box: in the training pictures they stand "
        "unlabelled, and captions mention them. It detects them by name, with what it learned from "
        "a vision-language model.",
    )
    write_page(path, page)
    drawn = list(panels.values())
    rows = [SheetRow(each, [""] * len(each)) for each in (drawn[:4], drawn[4:8]) if each]
    if rows:
        overview = draw_sheet(rows, panel_px=_BEST_PX)
        save_picture(Path(path).with_name("overview.jpg"), overview)


def _stored_section(
    figures: Sequence[tuple[str, str, float | None, float | None, float | None]],
    stored: Mapping[str, Sequence[float]],
) -> Section:
    """This run beside figures of other recipes."""
    found = {(protocol, group): ap50 for protocol, group, ap50, *_ in figures}
    columns = [("ZSD", "novel"), *(("GZSD", group) for group in _GROUPS)]
    rows: list[list[Cell]] = [["this run", *(found.get(column) for column in columns)]]
    rows += [[name, *values] for name, values in stored.items()]
    return Section(
        "Beside other recipes",
        table=Table(["AP50", *map(" ".join, columns)], rows, num_texts=1),
        caption="The other rows are not of now: they are stored, means over seeds, of "
        "docs/lab/miniature.md.",
    )


def _best_section(panels: Mapping[str, Image], novel: Sequence[str]) -> Section:
    figures = [Figure([embedded(panel, name)], title=name) for name, panel in panels.items()]
    missed = ", ".join(name for name in novel if name not in panels)
    return Section(
        figures=figures,
        columns=4,
        caption="For each novel class, the test picture with its most confident correct detection, "
        "and the detections of this class alone: blue is correct, orange wrong. These are the best "
        "ones; the pictures further down are chosen without looking at the detections."
        + (f" Not found at all: {missed}." if missed else ""),
    )


def _draw_best(sample: Sample, name: str) -> Image:
    found = [box for box in sample.detections if box.class_name == name]
    return draw_sample(sample, found, side=_BEST_PX)


def _heat_maps(predictor: OpenVocabularyPredictor, sample: Sample, novel: Sequence[str]) -> Figure:
    """A sheet of the novel classes in a picture."""
    present = [name for name in novel if any(t.class_name == name for t in sample.truth)]
    maps = score_heat_maps(predictor.model, predictor.prepare(sample.image), present)
    sheet = draw_heat_map_sheet(sample.image[:, :, ::-1], maps)
    return Figure([embedded(sheet, f"heat maps of {', '.join(present)}")])
