"""The miniature's ``report.html``: one file that needs no other.

The report is the first thing a visitor of the project sees. Pictures are embedded, nothing is
fetched, and every text that comes from data is escaped.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image as PILImage

from hierkd.evaluation.heat_maps import overlay_heat_map, score_heat_maps
from hierkd.experiments.results import Results, summary_rows
from hierkd.inference.predictor import OpenVocabularyPredictor
from hierkd.reports.drawing import Image, enlarge
from hierkd.reports.gallery import (
    Sample,
    best_sample_per_class,
    build_samples,
    choose_by_ground_truth,
    draw_overview,
    draw_sample,
    keep_as_many_as_objects,
)
from hierkd.reports.metrics import Curve, read_run_metrics
from hierkd.reports.page import escape, figure, jpeg_uri, page
from hierkd.reports.sections import (
    BASE_LEGEND,
    NOVEL_LEGEND,
    curve_grid,
    facts,
    legend,
    loss_names,
    number,
    pairs,
)

__all__ = ["write_report"]

_HEAT_MAP_PICTURES = 3
# Pictures of overview.jpg: three rows. [ours]
_OVERVIEW_PICTURES = 6
# Bright end of a heat map's colours where every score is tiny, so that noise stays dark. [ours]
_MIN_HEAT_RANGE = 0.05


def write_report(
    path: str | os.PathLike[str],
    results: Results,
    *,
    run_dir: str | os.PathLike[str],
    predictor: OpenVocabularyPredictor,
    dataset_name: str,
    num_examples: int = 12,
) -> None:
    """Write the self-contained report of a run, and ``overview.jpg`` beside it.

    Args:
        path: The HTML file.
        results: As from :func:`hierkd.experiments.results.collect_results`.
        run_dir: The training's folder, with detectron2's ``metrics.json``.
        predictor: The trained detector; its vocabulary is put back afterwards.
        dataset_name: Test pictures: a registered dataset with base and novel classes.
        num_examples: How many pictures show ground truth beside detections.

    Raises:
        FileNotFoundError: There is no ``metrics.json`` in ``run_dir``.
    """
    metadata = MetadataCatalog.get(dataset_name)
    vocabulary = list(metadata.thing_classes)
    novel = [name for name in vocabulary if name in set(metadata.novel_classes)]
    curves = _loss_curves(run_dir)
    with predictor.model.vocabulary(vocabulary):
        samples = keep_as_many_as_objects(
            build_samples(DatasetCatalog.get(dataset_name), predictor, vocabulary, novel)
        )
        examples = choose_by_ground_truth(samples, novel, num_examples)
        heat_maps = [
            _heat_map_rows(predictor, sample, novel) for sample in examples[:_HEAT_MAP_PICTURES]
        ]
    num_base = len(vocabulary) - len(novel)
    content = [
        _hero(best_sample_per_class(samples, novel), novel, num_base),
        _figures_section(results),
        _examples_section(examples),
        _heat_map_section(heat_maps),
        _curves_section(curves),
        _provenance_section(results),
    ]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(page("HierKD: the miniature", "\n".join(content)), encoding="utf-8")
    overview = draw_overview(examples[:_OVERVIEW_PICTURES])
    PILImage.fromarray(overview).save(Path(path).with_name("overview.jpg"), quality=88)


def _loss_curves(run_dir: str | os.PathLike[str]) -> dict[str, dict[str, Curve]]:
    """Loss to its one curve, ``total_loss`` first."""
    curves = read_run_metrics(Path(run_dir) / "metrics.json").curves
    return {name: {"": curves[name]} for name in loss_names(curves)}


# -------------------------------------------------------------------------------------- sections


def _hero(best: Sequence[tuple[str, Sample]], novel: Sequence[str], num_base: int) -> str:
    figures = [
        figure(
            jpeg_uri(draw_sample(sample, [d for d in sample.detections if d.class_name == name])),
            f"<b>{escape(name)}</b>",
            name,
        )
        for name, sample in best
    ]
    missed = [name for name in novel if name not in dict(best)]
    note = f" Not found at all: {escape(', '.join(missed))}." if missed else ""
    return f"""<header>
<h1>Found by name, never boxed in training</h1>
<p class="lead">This detector was trained with boxes of {num_base} classes. The {len(novel)} classes
below never had a box: in the training pictures they stand unlabelled, and captions mention them. It
detects them by name, with what it learned from a vision-language model.</p>
<div class="grid four">{"".join(figures)}</div>
<p class="caption">For each novel class, the test picture with its most confident correct detection,
and the detections of this class alone. {legend(NOVEL_LEGEND)} These are the best ones; the
pictures further down are chosen without looking at the detections.{note}</p>
</header>"""


def _figures_section(results: Results) -> str:
    cards = (
        ("Novel classes, AP50", results["zsd"]["novel"]["AP50"], "novel names only (ZSD)"),
        ("Novel classes, AP50", results["gzsd"]["novel"]["AP50"], "all names compete (GZSD)"),
        ("Base classes, AP50", results["gzsd"]["base"]["AP50"], "all names compete (GZSD)"),
        (
            "Upper bound, novel AP50",
            results["upper_bound"]["zsd"]["novel"]["AP50"],
            "CLIP names the true boxes",
        ),
    )
    card_html = "".join(
        f'<div class="card"><span>{escape(title)}</span><strong>{number(value)}</strong>'
        f"<small>{escape(note)}</small></div>"
        for title, value, note in cards
    )
    rows = "".join(
        f"<tr><td>{escape(protocol)}</td><td>{escape(group)}</td>"
        f"<td>{number(ap)}</td><td>{number(ar)}</td><td>{number(bound)}</td></tr>"
        for protocol, group, ap, ar, bound in summary_rows(results)
    )
    return f"""<section>
<h2>The figures</h2>
<div class="cards">{card_html}</div>
<table><thead><tr><th>Test</th><th>Classes</th><th>AP50</th><th>AR50</th>
<th>Upper bound AP50</th></tr></thead>
<tbody>{rows}</tbody></table>
<p class="caption">Percent, on the untouched test split. AP50: average precision at an overlap (IoU)
of 0.5. AR50: share of the objects found at that overlap by at most 100 detections a
picture. ZSD: only the novel names are asked for, on pictures with novel objects. GZSD: all names
are asked for at once. Upper bound: the true boxes, named by the CLIP that taught the detector.</p>
<p><b>What this is, and is not.</b> This is a miniature: rendered icons on small pictures, a tiny
CLIP trained on the same world (novel classes included, as for the real CLIP) and a short training
on a CPU. It shows the method at work; its figures say nothing about COCO. It is one run with one
seed: runs that differ in nothing but the seed differ by a few points.</p>
</section>"""


def _examples_section(examples: Sequence[Sample]) -> str:
    return f"""<section>
<h2>Ground truth beside detections</h2>
<p>{len(examples)} test pictures that show the novel classes in turn, chosen by their ground truth
alone. All names, base and novel, compete.</p>
<p>{legend((*NOVEL_LEGEND, *BASE_LEGEND))}</p>
{pairs(examples)}
<p class="caption">Drawn are, of each class, the best detections over all test pictures, as many
as there are objects; with their scores, which differ in scale from class to class. A detection
is correct if its class is right and its overlap with an object not yet found is at least 0.5.
Base classes, which were boxed in training, are left unlabelled.</p>
</section>"""


def _heat_map_rows(
    predictor: OpenVocabularyPredictor, sample: Sample, novel: Sequence[str]
) -> list[tuple[str, Image, list[tuple[str, Image]]]]:
    """One row per novel class in the picture: (class, picture, [(level and best score, map)])."""
    batched_input = predictor.prepare(sample.image)
    present = [name for name in novel if any(t.class_name == name for t in sample.truth)]
    picture, _ = enlarge(np.ascontiguousarray(sample.image[:, :, ::-1]), 400)
    rows = []
    for maps in score_heat_maps(predictor.model, batched_input, present):
        top = max(_MIN_HEAT_RANGE, *(float(m.scores.max()) for m in maps))
        of_class = [t for t in sample.truth if t.class_name == maps[0].class_name]
        panels = [
            (
                f"{m.level.upper()}, stride {m.stride}: best {m.scores.max():.2f}",
                overlay_heat_map(picture, m.scores, top),
            )
            for m in maps
        ]
        rows.append((maps[0].class_name, draw_sample(sample, of_class), panels))
    return rows


def _heat_map_section(
    pictures: Sequence[Sequence[tuple[str, Image, Sequence[tuple[str, Image]]]]],
) -> str:
    rows = []
    for name, picture, panels in (row for picture_rows in pictures for row in picture_rows):
        cells = [figure(jpeg_uri(picture), f"<b>{escape(name)}</b>", name)]
        cells += [
            figure(jpeg_uri(panel), escape(note), f"{name}, {note}") for note, panel in panels
        ]
        rows.append(f'<div class="grid four heat">{"".join(cells)}</div>')
    return f"""<section>
<h2>Where each level sees a class</h2>
<p>The score of one novel class at every point, class probability times predicted overlap, for each
level of the feature pyramid; all names compete. Fine levels answer for small objects, coarse ones
for large.</p>
{"".join(rows)}
<p class="caption">Left: the picture with the objects of the class. The colours of a row run from 0
<i class="ramp"></i> to its best score, or to {_MIN_HEAT_RANGE} if that is higher. After Fig. 4 of
the paper.</p>
</section>"""


def _curves_section(curves: Mapping[str, Mapping[str, Curve]]) -> str:
    return f"""<section>
<h2>Training losses</h2>
{curve_grid(curves)}
<p class="caption">Weighted as in Eq. 6, against the iteration; medians over 20 iterations.</p>
</section>"""


def _provenance_section(results: Results) -> str:
    entries = {
        "Config": results["config"],
        "Seed": results["seed"],
        "Commit": results["commit"],
        **{f"Seconds, {stage}": value for stage, value in results["seconds"].items()},
    }
    return f"""<section>
<h2>How it was made</h2>
{facts(entries)}
</section>"""
