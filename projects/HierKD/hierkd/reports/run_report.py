"""A report of any run's folder, in one HTML file that needs no other.

What a folder lacks, because the run was killed, only evaluated, or made before something was
recorded, is left out of the report, which says so. Nothing in the folder is run: configs, metrics
and results are read as plain values, and every text is escaped.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances

from hierkd.config import add_hierkd_config
from hierkd.data.mapper import read_picture
from hierkd.files import replacing
from hierkd.inference.predictor import OpenVocabularyPredictor, find_checkpoint
from hierkd.load_config import load_config
from hierkd.reports.gallery import (
    Sample,
    choose_samples,
    choose_test_dataset,
    judged_classes,
    with_detections,
)
from hierkd.reports.metrics import Curve, RunMetrics, read_run_metrics
from hierkd.reports.page import escape, page
from hierkd.reports.run_record import ENVIRONMENT, EVALUATIONS, read_entries
from hierkd.reports.sections import (
    BASE_LEGEND,
    NOVEL_LEGEND,
    TITLES,
    bar,
    curve_figure,
    curve_grid,
    details,
    facts,
    legend,
    loss_names,
    number,
    pairs,
    table,
)

__all__ = ["Evaluation", "RunFolder", "read_run", "write_run_report"]

logger = logging.getLogger(__name__)

_METRICS = ("AP50", "AR50", "AP", "AP75", "APs", "APm", "APl")
# A scalar of an evaluation: <dataset>/<task>/<group>/<metric> or <dataset>/<task>/AP50-<class>.
_FIGURE = re.compile(r"(?P<dataset>[^/]+)/[^/]+/(?P<name>.+)", re.DOTALL)
_GROUPS = ("novel", "base", "all")
_PROTOCOLS = ("ZSD", "base alone", "GZSD", "–")  # in the order of the tables
_PER_CLASS = "AP50-"
_CLASSES_SHOWN = 100  # in a table that is not folded away


@dataclass(frozen=True)
class Evaluation:
    """Figures of one evaluation.

    Attributes:
        title: What was evaluated, and when.
        figures: Dataset to name (``novel/AP50``, ``AP50-cat``) to percent; NaN without objects.
    """

    title: str
    figures: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class RunFolder:
    """What was found in a run's folder.

    Attributes:
        path: The folder.
        config: Of ``config.yaml``, plain values; None if there is none.
        config_text: The file itself.
        metrics: None if nothing was trained.
        starts: Entries of ``environment.json``, since the run was begun from iteration 0.
        evaluations: Last ones first; the first are the run's figures.
        notes: What is missing or broken.
    """

    path: Path
    config: Mapping[str, Any] | None
    config_text: str
    metrics: RunMetrics | None
    starts: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Evaluation]
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @property
    def last_iteration(self) -> int | None:
        """The last step of which there are losses, from 0."""
        if self.metrics is None or "total_loss" not in self.metrics.curves:
            return None
        return self.metrics.curves["total_loss"][0][-1]


def read_run(path: str | os.PathLike[str]) -> RunFolder:
    """Read all that a run's folder says.

    Raises:
        FileNotFoundError: There is no such folder, or it is none of a run; says what is missing.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r} (looked from {os.getcwd()!r})")
    known = ("config.yaml", "metrics.json", EVALUATIONS)
    if not any((folder / name).is_file() for name in known):
        raise FileNotFoundError(
            f"{folder} is no folder of a run: it has none of {', '.join(known)}, which "
            "train_net.py writes into OUTPUT_DIR"
        )
    notes: list[str] = []
    text, config = _read_config(folder / "config.yaml", notes)
    metrics = None
    try:
        metrics = read_run_metrics(folder / "metrics.json")
    except FileNotFoundError:
        notes.append("There is no metrics.json: nothing was trained here.")
    if metrics is not None and metrics.num_broken:
        notes.append(f"{metrics.num_broken} broken lines of metrics.json were skipped.")
    if metrics is not None and metrics.num_restarts:
        notes.append(
            f"The run went back to an earlier iteration {metrics.num_restarts} times; steps that "
            "were done again are shown once, as they were done last."
        )
    starts = _read_entries(folder / ENVIRONMENT, notes)
    if not starts:
        notes.append(f"There is no {ENVIRONMENT}: when, where and at which commit is not recorded.")
    begun = max((i for i, each in enumerate(starts) if each.get("iteration") == 0), default=0)
    if begun > 0:
        notes.append(f"{begun} earlier starts in this folder are left out: it was begun anew.")
    alone = [
        Evaluation(
            f"--eval-only of {entry.get('weights') or 'random weights'}, {entry.get('date')}",
            _by_dataset(entry.get("figures")),
        )
        for entry in reversed(_read_entries(folder / EVALUATIONS, notes))
    ]
    trained = _evaluations_of_training(metrics)
    # the figures of a training are those of its own evaluations; others may be of other weights
    return RunFolder(folder, config, text, metrics, starts[begun:], [*trained, *alone], notes)


def write_run_report(
    path: str | os.PathLike[str],
    run: RunFolder,
    *,
    others: Sequence[RunFolder] = (),
    num_pictures: int = 12,
    device: str | None = None,
) -> None:
    """Write the report of a run.

    Args:
        path: The HTML file.
        run: What it is about.
        others: Runs to compare it with: their curves and figures are shown beside its own.
        num_pictures: Test pictures with detections, at most; 0 is none.
        device: Where the detector runs, if no detections of an evaluation are there; None is the
            config's.
    """
    runs = [run, *others]
    samples: list[Sample] = []
    source = ""
    if num_pictures > 0:
        samples, source = _find_pictures(run, num_pictures, device)
    content = [
        _summary_section(run),
        _comparison_section(runs) if others else "",
        _figures_section(run),
        _curves_sections(runs),
        _pictures_section(samples, source) if source else "",
        _classes_section(run),
        _provenance_section(run),
        _config_section(run),
    ]
    title = f"HierKD: {run.name}"
    with replacing(path) as making:
        making.write_text(page(title, "\n".join(filter(None, content))), encoding="utf-8")


# --------------------------------------------------------------------------------------- reading


def _read_config(path: Path, notes: list[str]) -> tuple[str, Mapping[str, Any] | None]:
    if not path.is_file():
        notes.append("There is no config.yaml: the config is unknown, and pictures are left out.")
        return "", None
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        notes.append(f"config.yaml cannot be read: {error}")
        return text, None
    if not isinstance(config, dict):
        notes.append("config.yaml is no config: it holds no keys.")
        return text, None
    return text, config


def _read_entries(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    try:
        return read_entries(path)
    except ValueError as error:
        notes.append(str(error))
        return []


def _by_dataset(figures: Any) -> dict[str, dict[str, float]]:
    """Dataset to name to value, of flat names to values; what is no number becomes NaN."""
    found: dict[str, dict[str, float]] = {}
    for key, value in figures.items() if isinstance(figures, Mapping) else ():
        dataset, name = _split(str(key)) or ("", "")
        if name:
            is_number = isinstance(value, int | float) and abs(value) < math.inf
            found.setdefault(dataset, {})[name] = float(value) if is_number else math.nan
    return dict(sorted(found.items(), key=lambda each: _PROTOCOLS.index(_protocol(each[1]))))


def _split(scalar: str) -> tuple[str, str] | None:
    """Dataset and name of an evaluation's figure; None for other scalars."""
    matched = _FIGURE.fullmatch(scalar)
    return (matched["dataset"], matched["name"]) if matched else None


def _evaluations_of_training(metrics: RunMetrics | None) -> list[Evaluation]:
    """Those on the way and at the end, last first."""
    if metrics is None:
        return []
    by_iteration: dict[int, dict[str, float]] = {}
    for name, (iterations, values) in metrics.curves.items():
        if _split(name):
            for iteration, value in zip(iterations, values, strict=True):
                by_iteration.setdefault(iteration, {})[name] = value
    return [
        Evaluation(f"in training, iteration {iteration}", _by_dataset(figures))
        for iteration, figures in sorted(by_iteration.items(), reverse=True)
    ]


def _groups(figures: Mapping[str, float]) -> list[str]:
    """The groups of classes that figures tell of: those of an evaluator here, then others."""
    found = {name.split("/")[0] for name in figures if "/" in name}
    return [*(g for g in _GROUPS if g in found), *sorted(found - set(_GROUPS))]


def _protocol(figures: Mapping[str, float]) -> str:
    """What a dataset tests, told from the groups of its vocabulary."""
    return {("novel",): "ZSD", ("base",): "base alone", _GROUPS: "GZSD"}.get(
        tuple(_groups(figures)), "–"
    )


# -------------------------------------------------------------------------------------- pictures


def _find_pictures(run: RunFolder, count: int, device: str | None) -> tuple[list[Sample], str]:
    """Test pictures with detections and where these come from; a note in ``run`` if there are none.

    The detections are those that the last evaluation has left; otherwise those of the checkpoint.
    """
    if run.config is None:
        return [], ""
    try:
        cfg = load_config(str(run.path / "config.yaml"), ["MODEL.DEVICE", device] if device else [])
        dataset_name = choose_test_dataset(
            [name for name in cfg.DATASETS.TEST if name in DatasetCatalog.list()]
        )
        if dataset_name is None:
            raise ValueError("none of the datasets in DATASETS.TEST is registered")
        records = DatasetCatalog.get(dataset_name)
        vocabulary = list(MetadataCatalog.get(dataset_name).thing_classes)
        judged = judged_classes(dataset_name)
        chosen = choose_samples(records, vocabulary, judged, count)
        detect, source = _saved_detections(run.path, dataset_name, records)
        if detect is None:
            detect, source = _checkpoints_detections(run.path, vocabulary, device)
        samples = []
        for sample in chosen:
            image = read_picture(sample.file_name)
            found = detect(sample.file_name, image)
            samples.append(with_detections(sample, image, found, vocabulary, judged))
    # whatever a folder, a dataset and a checkpoint can be wrong in: the rest can still be told
    except Exception as error:
        logger.warning("%s: no pictures: %s", run.path, error)
        run.notes.append(f"There are no pictures: {error}")
        return [], ""
    return samples, f"{dataset_name}; {source}"


_Detect = Callable[[str, Any], Instances]


def _saved_detections(
    folder: Path, dataset_name: str, records: Sequence[Mapping[str, Any]]
) -> tuple[_Detect | None, str]:
    """What the last evaluation has written, if it has."""
    path = folder / "inference" / dataset_name / "coco_instances_results.json"
    if not path.is_file():
        return None, ""
    content = json.loads(path.read_bytes())
    positions = MetadataCatalog.get(dataset_name).thing_dataset_id_to_contiguous_id
    by_image: dict[Any, list[Mapping[str, Any]]] = {}
    for result in content:
        if result["category_id"] in positions:
            by_image.setdefault(result["image_id"], []).append(result)
    ids = {record["file_name"]: record["image_id"] for record in records}

    def detect(file_name: str, image: Any) -> Instances:
        results = by_image.get(ids[file_name], [])
        boxes = torch.tensor([r["bbox"] for r in results], dtype=torch.float32).reshape(-1, 4)
        boxes = BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
        return Instances(
            image.shape[:2],
            pred_boxes=Boxes(boxes),
            scores=torch.tensor([float(r["score"]) for r in results]),
            pred_classes=torch.tensor([positions[r["category_id"]] for r in results]).long(),
        )

    when = datetime.fromtimestamp(path.stat().st_mtime).astimezone()
    return detect, f"detections of the evaluation of {when:%Y-%m-%d %H:%M}"


def _checkpoints_detections(
    folder: Path, vocabulary: Sequence[str], device: str | None
) -> tuple[_Detect, str]:
    """What the folder's checkpoint detects now."""
    _, weights = find_checkpoint(folder)
    predictor = OpenVocabularyPredictor.from_checkpoint(folder, device=device)
    predictor.set_vocabulary(vocabulary)
    return lambda _, image: predictor(image), f"detections of {Path(weights).name}"


# -------------------------------------------------------------------------------------- sections


def _summary_section(run: RunFolder) -> str:
    entries: dict[str, Any] = {"State": _state(run)}
    seconds = _training_seconds(run.metrics)
    if run.starts:
        first, last = run.starts[0], run.starts[-1]
        entries["Begun"] = first.get("date")
        if len(run.starts) > 1:
            entries["Starts"] = f"{len(run.starts)}, the last one {last.get('date')}"
        entries["Commit"] = " → ".join(
            dict.fromkeys(str(each.get("commit") or "unknown") for each in run.starts)
        )
    if seconds is not None:
        entries["Training time"] = f"{_duration(seconds)}, without evaluations"
    if run.config is not None:
        for title, keys in (
            ("Trained on", ("DATASETS", "TRAIN")),
            ("Tested on", ("DATASETS", "TEST")),
            ("Images per step", ("SOLVER", "IMS_PER_BATCH")),
            ("Seed", ("SEED",)),
        ):
            value = _look_up(run.config, keys)
            if value is not None:
                entries[title] = ", ".join(map(str, value)) if isinstance(value, list) else value
    notes = "".join(f"<li>{escape(note)}</li>" for note in run.notes)
    return f"""<header>
<h1>{escape(run.name)}</h1>
{_cards(run)}
{facts(entries)}
{f'<ul class="notes">{notes}</ul>' if notes else ""}
</header>"""


def _cards(run: RunFolder) -> str:
    if not run.evaluations:
        return ""
    cards = []
    for dataset, figures in run.evaluations[0].figures.items():
        protocol = _protocol(figures)
        for group in _groups(figures):
            if f"{group}/AP50" in figures and (protocol != "GZSD" or group != "all"):
                value = number(figures[f"{group}/AP50"])
                name = f"{group} AP50" if protocol == "–" else f"{group} AP50, {protocol}"
                cards.append(
                    f'<div class="card"><span>{escape(name)}</span><strong>{value}</strong>'
                    f"<small>{escape(dataset)}</small></div>"
                )
    return f'<div class="cards">{"".join(cards[:4])}</div>' if cards else ""


def _state(run: RunFolder) -> str:
    last = run.last_iteration
    if last is None:
        return "evaluated only" if run.evaluations else "no step was recorded"
    total = None if run.config is None else _look_up(run.config, ("SOLVER", "MAX_ITER"))
    if (run.path / "model_final.pth").is_file() or last + 1 == total:
        return f"finished, {last + 1} iterations"
    of = f" of {total}" if total is not None else ""
    checkpoint = run.path / "last_checkpoint"
    kept = ""
    if checkpoint.is_file():
        with suppress(OSError):
            name = checkpoint.read_text(encoding="utf-8", errors="replace").strip()
            kept = f"; last checkpoint {name}"
    return f"unfinished, at least {last + 1}{of} iterations{kept}"


def _training_seconds(metrics: RunMetrics | None) -> float | None:
    """Seconds of all steps, of each as many as the median that was written for it says."""
    if metrics is None or "time" not in metrics.curves:
        return None
    total, before = 0.0, -1
    for iteration, seconds in zip(*metrics.curves["time"], strict=True):
        if math.isfinite(seconds):
            total += (iteration - before) * seconds
        before = iteration
    return total


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return str(timedelta(seconds=round(seconds)))


def _look_up(config: Mapping[str, Any], keys: Sequence[str]) -> Any:
    value: Any = config
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _figures_section(run: RunFolder) -> str:
    if not run.evaluations:
        return "<section><h2>Figures</h2><p>Nothing was evaluated yet.</p></section>"
    first, *others = run.evaluations
    folded = "".join(details(each.title, _figures_table(each)) for each in others)
    return f"""<section>
<h2>Figures</h2>
<p>{escape(first.title)}</p>
{_figures_table(first)}
<p class="caption">Percent. AP50: average precision at an overlap (IoU) of 0.5. AR50: share of the
objects found at that overlap. AP: mean over overlaps from 0.5 to 0.95; APs, APm, APl: of small,
medium and large objects. ZSD: only the novel names are asked for. GZSD: all names compete. A dash:
there are no such objects.</p>
{folded}
</section>"""


def _figures_table(evaluation: Evaluation) -> str:
    rows = [
        [_protocol(figures), group, dataset, *(_figure_cell(figures, group, m) for m in _METRICS)]
        for dataset, figures in evaluation.figures.items()
        for group in _groups(figures)
    ]
    extra = {
        f"{dataset}: {name}": number(value)
        for dataset, figures in evaluation.figures.items()
        for name, value in figures.items()
        if not name.startswith(_PER_CLASS) and name.split("/")[-1] not in _METRICS
    }
    text = table(["Test", "Classes", "Dataset", *_METRICS], rows, num_texts=3) if rows else ""
    return text + (details("Other figures", facts(extra)) if extra else "")


def _figure_cell(figures: Mapping[str, float], group: str, metric: str) -> str:
    return number(figures.get(f"{group}/{metric}"))


def _comparison_section(runs: Sequence[RunFolder]) -> str:
    """A row per figure, a column per run; the AP50 and AR50 of the last evaluations."""
    last = [run.evaluations[0].figures if run.evaluations else {} for run in runs]
    names: dict[tuple[str, str], None] = {}
    for figures in last:
        for dataset, of_dataset in figures.items():
            for group in _groups(of_dataset):
                names.update({(dataset, f"{group}/{m}"): None for m in ("AP50", "AR50")})
    rows = [
        [dataset, name, *(number(f.get(dataset, {}).get(name)) for f in last)]
        for dataset, name in names
    ]
    rows.append(["", "iterations", *(_count(run.last_iteration) for run in runs)])
    titles = _distinct_names(runs)
    return f"""<section>
<h2>Runs side by side</h2>
{table(["Dataset", "Figure", *titles], rows)}
<p class="caption">Percent, of the last evaluation of each run.</p>
</section>"""


def _count(last_iteration: int | None) -> str:
    return "–" if last_iteration is None else str(last_iteration + 1)


def _distinct_names(runs: Sequence[RunFolder]) -> list[str]:
    """As much of each path, from its end, as tells the runs apart."""
    paths = [run.path.resolve().parts for run in runs]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{run.name} ({number})" for number, run in enumerate(runs, start=1)]


def _curves_sections(runs: Sequence[RunFolder]) -> str:
    """Curves by subject: a figure per scalar and a line per run."""
    names = _distinct_names(runs)
    of_runs = {
        name: run.metrics.curves for name, run in zip(names, runs, strict=True) if run.metrics
    }
    scalars = dict.fromkeys(s for curves in of_runs.values() for s in curves)
    if all(c.get("rank_data_time") == c.get("data_time") for c in of_runs.values()):
        scalars.pop("rank_data_time", None)  # there was one process

    def grid(wanted: Sequence[str]) -> str:
        chosen = {
            scalar: {name: curves[scalar] for name, curves in of_runs.items() if scalar in curves}
            for scalar in wanted
            if scalar in scalars
        }
        return curve_grid(chosen, list(of_runs)) if chosen else ""

    losses = loss_names(scalars)
    learned = [s for s in TITLES if s in _LEARNED]
    speed = ("time", "data_time", "rank_data_time")
    known = {*losses, *learned, *speed, "eta_seconds"}
    rest = [s for s in scalars if s not in known and not _split(s)]
    parts = [
        _section(
            "Losses",
            grid(losses),
            "Weighted as in Eq. 6, against the iteration; medians over up to 20 iterations.",
        ),
        _section("Average precision over time", _precision_curves(of_runs), _PRECISION_CAPTION),
        _section("What is learned beside the network", grid(learned), _LEARNED_CAPTION),
        _section("Speed", grid(speed), "Medians over up to 20 iterations."),
    ]
    if rest:
        parts.append(f"<section>{details('Other scalars', grid(rest))}</section>")
    return "\n".join(filter(None, parts))


_LEARNED = {
    *("lr", "tau_c", "tau_m", "cls_weight", "background_start_cosine", "background_class_cosine"),
    *("num_pos_anchors", "iou_pos_anchors", "num_distilled_regions", "iou_distilled_regions"),
}
_LEARNED_CAPTION = (
    "The factors τ_c and τ_m, the background's embedding, and how many points are positive and "
    "distilled. What they mean, and what is healthy: docs/monitoring.md."
)
_PRECISION_CAPTION = "AP50 in percent, of every evaluation in training."


def _precision_curves(of_runs: Mapping[str, Mapping[str, Curve]]) -> str:
    """A figure per dataset, with a line per group of classes and run, if there are two points."""
    scalars = dict.fromkeys(s for curves in of_runs.values() for s in curves)
    figures = []
    for dataset, names in _by_dataset(scalars).items():
        lines = {}
        for group in _groups(names):
            wanted = (dataset, f"{group}/AP50")
            for run, curves in of_runs.items():
                curve = next((c for s, c in curves.items() if _split(s) == wanted), None)
                if curve is not None and len(curve[0]) > 1:
                    lines[group if len(of_runs) == 1 else f"{run}: {group}"] = curve
        if lines:
            figures.append(curve_figure(dataset, lines))
    return f'<div class="grid three">{"".join(figures)}</div>' if figures else ""


def _section(title: str, content: str, caption: str) -> str:
    if not content:
        return ""
    return f"""<section>
<h2>{escape(title)}</h2>
{content}
<p class="caption">{escape(caption)}</p>
</section>"""


def _pictures_section(samples: Sequence[Sample], source: str) -> str:
    return f"""<section>
<h2>Ground truth beside detections</h2>
<p>{legend((*NOVEL_LEGEND, *BASE_LEGEND))}</p>
{pairs(samples, label_uncounted=True)}
<p class="caption">{escape(source)}. The pictures show the novel classes in turn and are chosen by
their ground truth alone; without novel classes, all classes count as such. All names compete. Drawn
are the best detections of novel and of base classes, of each as many as the picture has objects, so
one that is missed leaves room for a wrong one. A detection is correct if its class is right and its
overlap with an object not yet found is at least 0.5.</p>
</section>"""


def _classes_section(run: RunFolder) -> str:
    """AP50 of each class, in each dataset of the last evaluation."""
    figures = run.evaluations[0].figures if run.evaluations else {}
    of_classes = {
        dataset: {n.removeprefix(_PER_CLASS): v for n, v in of.items() if n.startswith(_PER_CLASS)}
        for dataset, of in figures.items()
    }
    of_classes = {dataset: values for dataset, values in of_classes.items() if values}
    if not of_classes:
        return ""
    kinds: dict[str, str] = {}
    for dataset, values in of_classes.items():
        (group, *more) = _groups(figures[dataset]) or [""]
        for name in values:
            if not more and group in ("base", "novel"):
                kinds[name] = group
    names = sorted({name for values in of_classes.values() for name in values})
    names.sort(key=lambda name: {"novel": 0, "base": 1}.get(kinds.get(name, ""), 2))
    rows = [
        [
            escape(name),
            escape(kinds.get(name, "–")),
            *(
                bar(values.get(name), novel=kinds.get(name) == "novel")
                for values in of_classes.values()
            ),
        ]
        for name in names
    ]
    content = table(["Class", "Kind", *of_classes], rows, escaped=True)
    if len(names) > _CLASSES_SHOWN:
        content = details(f"{len(names)} classes", content)
    return f"""<section>
<h2>AP50 of each class</h2>
{content}
</section>"""


def _provenance_section(run: RunFolder) -> str:
    parts = []
    for count, start in enumerate(run.starts, start=1):
        hardware = start.get("hardware")
        versions = start.get("versions")
        entries = {
            "Date": start.get("date"),
            "From iteration": start.get("iteration"),
            "Command": start.get("command"),
            "Commit": start.get("commit") or "unknown",
            "Processes": start.get("num_processes"),
            "Hardware": _hardware(hardware if isinstance(hardware, Mapping) else {}),
            "Versions": ", ".join(f"{k} {v}" for k, v in versions.items())
            if isinstance(versions, Mapping)
            else "unknown",
        }
        title = f"Start {count} of {len(run.starts)}: iteration {start.get('iteration')}"
        parts.append(facts(entries) if count == len(run.starts) else details(title, facts(entries)))
    if not run.starts and (text := _environment_in_log(run.path / "log.txt")):
        parts.append(details("The environment that log.txt tells of", f"<pre>{escape(text)}</pre>"))
    if not parts:
        return ""
    return f"""<section>
<h2>Where it ran</h2>
{"".join(parts)}
</section>"""


def _hardware(hardware: Mapping[str, Any]) -> str:
    gpus = hardware.get("gpus")
    counts = Counter(map(str, gpus)) if isinstance(gpus, list) else {}
    parts = [f"{n} × {name}" for name, n in counts.items()]
    parts.append(f"{hardware.get('cores')} cores of {hardware.get('processor')}")
    if hardware.get("memory_gib") is not None:
        parts.append(f"{hardware['memory_gib']} GiB of memory")
    return ", ".join([*parts, str(hardware.get("system"))])


def _environment_in_log(path: Path) -> str:
    """The table that detectron2 logs when it starts, of runs before there was a record."""
    if not path.is_file():
        return ""
    text = path.read_text(encoding="utf-8", errors="replace")
    found = re.findall(r"Environment info:\s*\n(-{5}.*?\n-{5}[^\n]*)\n", text, re.DOTALL)
    return str(found[-1]) if found else ""


def _config_section(run: RunFolder) -> str:
    if run.config is None and not run.config_text:
        return ""
    changed = table(["Key", "Value", "Default"], _changed_keys(run.config or {}), num_texts=3)
    return f"""<section>
<h2>Config</h2>
<p>What differs from the defaults of detectron2 and HierKD:</p>
{changed}
{details("The whole config", f"<pre>{escape(run.config_text)}</pre>")}
</section>"""


def _changed_keys(config: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Key, value and default of all that is not its default."""
    cfg = get_cfg()
    add_hierkd_config(cfg)
    defaults = dict(_flatten(yaml.safe_load(cfg.dump())))
    found = dict(_flatten(config))
    return [
        (key, _shown(value), _shown(defaults[key]) if key in defaults else "no such key")
        for key, value in sorted(found.items())
        if key not in defaults or value != defaults[key]
    ]


def _flatten(config: Mapping[Any, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            found += _flatten(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}…"
