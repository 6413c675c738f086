"""Numbers in the pages that follow from something else are what follows from it."""

import re
import tomllib

import pytest
import yaml
from detectron2.engine import DefaultTrainer
from docs_pages import PAGES, ROOT, name_of

from hierkd.data.prepare import EXPECTED_FULL_COCO
from hierkd.experiments.tables import TABLES
from hierkd.load_config import load_config


def text_of(name):
    return (ROOT / name).read_text()


def rows_of(name, first):
    """The cells of the table whose head begins with ``first``."""
    lines = text_of(name).splitlines()
    (head,) = [i for i, line in enumerate(lines) if line.startswith(f"| {first} |")]
    rows = []
    for line in lines[head + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


# -------------------------------------------------------------------------------- versions


def test_versions():
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    python = project["requires-python"].removeprefix(">=")
    pin = text_of("requirements/detectron2.txt")
    (detectron2,) = re.findall(r"^sal-detectron2==(\S+)", pin, re.MULTILINE)
    assert f"detectron2 {detectron2}" in text_of("docs/install.md")
    for page in PAGES:
        found = set(re.findall(r"Python >= (\d\.\d+)", page.read_text()))
        assert found <= {python}, name_of(page)
    for name in ("README.md", "docs/install.md"):
        assert f"Python >= {python}" in text_of(name)
    extras = {re.match(r"`([\w-]+)`", row[0])[1] for row in rows_of("docs/install.md", "extra")}
    assert extras == set(project["optional-dependencies"])


def test_citation():
    """``CITATION.cff`` has what the format 1.2.0 requires, of this version and of the paper."""
    citation = yaml.safe_load(text_of("CITATION.cff"))
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert str(citation["version"]) == project["version"]
    assert citation["license"] == project["license"]
    paper = citation["preferred-citation"]
    bibtex = dict(re.findall(r"^  (\w+) += {(.*)}", text_of("README.md"), re.MULTILINE))
    assert paper["type"] == "conference-paper"
    assert paper["title"] == bibtex["title"]
    assert str(paper["year"]) == bibtex["year"]
    names = [f"{each['family-names']}, {each['given-names']}" for each in paper["authors"]]
    assert " and ".join(names) == bibtex["author"]
    assert bibtex["booktitle"] in paper["collection-title"]


# -------------------------------------------------------------------------------- training


def test_recipes_of_other_numbers_of_gpus():
    overrides = ["SOLVER.REFERENCE_WORLD_SIZE", "4"]
    cfg = load_config(str(ROOT / "configs" / "hierkd_R50.yaml"), overrides)
    rows = rows_of("docs/training.md", "GPUs")
    assert [int(row[0]) for row in rows] == [1, 2, 4, 8]
    for row in rows:
        solver = DefaultTrainer.auto_scale_workers(cfg, int(row[0])).SOLVER
        expected = solver.IMS_PER_BATCH, solver.BASE_LR, solver.MAX_ITER, solver.WARMUP_ITERS
        assert tuple(float(cell.replace(",", "")) for cell in row[1:]) == expected


def test_images_of_the_splits():
    rows = rows_of("docs/evaluation.md", "figure")
    assert len(rows) == 3
    for row in rows:
        part = row[1].strip("`")
        (images,) = re.findall(r"\d,\d+", row[3])
        assert int(images.replace(",", "")) == EXPECTED_FULL_COCO["48_17", part].value


def test_counts_of_ablations():
    text = text_of("docs/reproduction.md")
    counts = re.findall(r"`configs/ablations/(table\d)_\*` \((\d)\)", text)
    assert {table for table, _ in counts} == {"table2", "table3", "table4", "table5"}
    for table, count in counts:
        assert len(list((ROOT / "configs" / "ablations").glob(f"{table}_*.yaml"))) == int(count)


# ------------------------------------------------------------------------------- model zoo

COLUMNS = ("ZSD novel AP50", "base AP50", "GZSD novel AP50", "GZSD base AP50", "GZSD all AP50")


def coco_rows():
    """Config -> cells, of the table of COCO."""
    lines = text_of("docs/model_zoo.md").splitlines()
    rows = [line.strip("|").split("|") for line in lines if line.startswith("| `configs/")]
    cells = [[cell.strip().strip("`") for cell in row] for row in rows]
    return {row[0]: row[1:] for row in cells if "miniature" not in row[0]}


def test_every_coco_config_is_in_the_zoo():
    """Those with the paper's teacher; docs/teachers.md has what others cost."""
    files = [ROOT / "configs" / "hierkd_R50.yaml"]
    for split in ("COCO-48-17", "COCO-65-15"):
        files += (ROOT / "configs" / split).iterdir()
    twin = "configs/COCO-48-17/hierkd_R50_1x.yaml"  # of hierkd_R50.yaml
    teachers = {name_of(path): load_config(str(path)).MODEL.TEACHER.WEIGHTS for path in files}
    names = {name for name, teacher in teachers.items() if teacher == "ViT-B/32"} - {twin}
    assert set(coco_rows()) == names
    assert load_config(str(ROOT / twin)).SOLVER == load_config(str(files[0])).SOLVER


def papers_figures():
    """Config -> what the paper reports, from Tables 2, 3, 7 and 8."""
    figures: dict[str, dict[str, float]] = {}
    for number in (7, 8):
        for row in TABLES[number].rows:
            if row.coco is None:  # another method's
                continue
            config = row.coco.config.replace("ablations/table4_ikd_gkd_iou", "hierkd_R50")
            figures.setdefault(config, {}).update(row.paper)
    figures["configs/COCO-48-17/hierkd_R50_release.yaml"] = figures["configs/hierkd_R50.yaml"]
    for config, number, label in (
        ("atss_R50_1x", 4, "no distillation"),
        ("ikd_R50_1x", 2, "predicted boxes, L1, 1.5x"),
        ("gkd_R50_1x", 4, "GKD"),
    ):
        (row,) = [row for row in TABLES[number].rows if row.label == label]
        figures[f"configs/COCO-48-17/{config}.yaml"] = {COLUMNS[0]: row.paper[COLUMNS[0]]}
    return figures


@pytest.mark.parametrize("config", coco_rows())
def test_the_papers_figures_in_the_zoo(config):
    expected = papers_figures().get(config, {})
    for cell, column in zip(coco_rows()[config], COLUMNS, strict=False):
        value = cell.split(" ")[0]
        assert value == (str(expected[column]) if column in expected else "?"), column
    assert coco_rows()[config][5] == "not trained"


def estimated_hours(cfg):
    """Least and most, as the page derives them."""
    images = cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH
    retinanet = images / (4 * 16 / 0.205 / 8) / 3600
    sides = [640, 672, 704, 736, 768, 800]
    pixels = sum(side**2 for side in sides) / 6
    at_800 = retinanet * 800**2 / pixels
    detector = at_800
    if len(cfg.INPUT.MIN_SIZE_TRAIN) == 2:
        low, high = cfg.INPUT.MIN_SIZE_TRAIN
        detector = retinanet * (high**3 - low**3) / 3 / (high - low) / pixels
    if cfg.MODEL.RESNETS.DEPTH == 101:
        detector *= 19.7 / 12.3
    ikd, gkd = cfg.MODEL.IKD.LOSS_WEIGHT > 0, cfg.MODEL.GKD.LOSS_WEIGHT > 0
    paper = 0.37 if ikd else 0.0
    measured = {(0, 0): 0.0, (1, 0): 0.74, (0, 1): 0.18, (1, 1): 0.83}[ikd, gkd]
    return detector + at_800 * paper, detector + at_800 * measured


@pytest.mark.parametrize("config", coco_rows())
def test_hours_of_the_zoo(config):
    least, most = estimated_hours(load_config(str(ROOT / config)))
    cell = coco_rows()[config][6]
    assert cell == "-".join(dict.fromkeys((f"{least:.0f}", f"{most:.0f}")))


def test_the_ratios_behind_the_hours_are_those_measured():
    performance = text_of("docs/performance.md")
    for line in (
        r"\| IKD \| [\d.]+ \| [\d.]+ \(1\.74\)",
        r"\| GKD \| [\d.]+ \| [\d.]+ \(1\.18\)",
        r"\| HierKD \(with the IoU branch\) \| [\d.]+ \| [\d.]+ \(1\.83\)",
        r"\*\*cached\*\* \| [\d.]+ \| \*\*1\.02\*\* \(1\.03\)",
        r"adds 37 % to a step",
        r"0\.97 of RetinaNet's operations",
    ):
        assert re.search(line, performance), line
    least, _ = estimated_hours(load_config(str(ROOT / "configs/COCO-48-17/atss_R50_1x.yaml")))
    assert f"= {least:.1f} h" in text_of("docs/model_zoo.md")
    assert f"should take {1.03 * least:.0f} hours" in text_of("docs/model_zoo.md")


# -------------------------------------------------------------------------------- miniature


def test_figures_of_the_miniature_agree():
    """README.md, the model zoo and docs/miniature.md print the same."""
    figure = r"\d+\.\d \(\d+\.\d-\d+\.\d\)"

    def figures(name, row):
        (line,) = [
            line
            for line in text_of(name).splitlines()
            if re.match(row, line) and len(re.findall(figure, line)) >= 5
        ]
        return re.findall(figure, line)

    for label in ("atss", "hierkd"):
        shown = rf"\| (no distillation|\*\*HierKD\*\*) \(`{label}`\)"
        source = figures("docs/miniature.md", shown)
        assert figures("README.md", shown) == source
        zoo = figures("docs/model_zoo.md", rf"\| `configs/miniature/{label}\.yaml`")
        assert zoo == [source[0], *source[2:]]  # without ZSD AR50
