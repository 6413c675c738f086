"""The rendered world: what is drawn, what is written down, and when it is made anew."""

import importlib.util
import json
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from hierkd.miniature import world as miniature
from hierkd.miniature.world import (
    MINIATURE_BASE,
    MINIATURE_CLASSES,
    MINIATURE_NOVEL,
    MiniatureSpec,
    Scene,
    ensure_miniature,
    make_captions,
    register_miniature,
    render_scene,
)

SPEC = MiniatureSpec(seed=3, train_images=24, val_images=8, test_images=8)


class World:
    """A world on disk, and the scenes it was written from: ``scenes[split]``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        drawn: list[Scene] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                miniature,
                "render_scene",
                lambda *arguments: drawn.append(render_scene(*arguments)) or drawn[-1],
            )
            ensure_miniature(root, SPEC)
        numbers = (SPEC.train_images, SPEC.val_images, SPEC.test_images)
        starts = np.cumsum([0, *numbers])
        self.scenes = {
            split: drawn[start : start + number]
            for split, start, number in zip(
                ("train", "val", "test"), starts[:-1], numbers, strict=True
            )
        }

    def read(self, part: str) -> dict:
        return json.loads((self.root / "annotations" / f"{part}.json").read_text())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world") / "miniature")


def files_of(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def boxes_by_image(content: dict) -> dict[int, list[tuple[str, list[float]]]]:
    """Class name and XYXY box of every annotation."""
    names = {category["id"]: category["name"] for category in content["categories"]}
    found: dict[int, list[tuple[str, list[float]]]] = {i["id"]: [] for i in content["images"]}
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        found[annotation["image_id"]].append(
            (names[annotation["category_id"]], [x, y, x + w, y + h])
        )
    return found


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text))


# ------------------------------------------------------------------------------ the classes


def test_there_are_24_base_and_8_novel_classes_and_their_ids_alternate() -> None:
    assert (len(MINIATURE_BASE), len(MINIATURE_NOVEL)) == (24, 8)
    assert tuple(sorted({*MINIATURE_BASE, *MINIATURE_NOVEL})) == MINIATURE_CLASSES
    novel_ids = sorted(MINIATURE_CLASSES.index(name) for name in MINIATURE_NOVEL)
    assert novel_ids[0] < 24, "novel classes must not all come last"
    assert max(np.diff(novel_ids)) > 1


def test_every_design_has_ink_and_no_two_classes_look_the_same() -> None:
    owners = [name for name, glyphs in miniature._GLYPHS.items() for _ in glyphs]
    designs = [design for glyphs in miniature._GLYPHS.values() for design in glyphs]
    masks = [miniature._glyph(design) for design in designs]
    for design, mask in zip(designs, masks, strict=True):
        assert mask.max() == 1
        assert 0.05 < mask.mean() < 0.95, design
        assert max(mask.shape) > miniature._GLYPH_PX / 2, "large enough to be scaled down"
    flat = np.stack([cv2.resize(mask, (32, 32)) > 0.5 for mask in masks]).reshape(len(masks), -1)
    iou = (flat[:, None] & flat[None]).sum(2) / (flat[:, None] | flat[None]).sum(2)
    other_class = np.array([[a != b for b in owners] for a in owners])
    assert (iou * other_class).max() < 0.9


# ------------------------------------------------------------------------------ the pictures


def render_without(index: int, names: list[str], seed: int) -> tuple[Scene, Scene]:
    """A scene, and the same one without the paint of one object."""
    whole = render_scene(names, SPEC, np.random.default_rng(seed))
    count = iter(range(len(names)))
    paint = miniature._paint

    def paint_but_one(picture, mask, x, y, rng):
        paint(picture.copy() if next(count) == index else picture, mask, x, y, rng)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(miniature, "_paint", paint_but_one)
        return whole, render_scene(names, SPEC, np.random.default_rng(seed))


@pytest.mark.parametrize("seed", range(4))
def test_a_box_is_tight_around_the_pixels_that_its_object_changes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = [str(name) for name in rng.choice(MINIATURE_CLASSES, 3)]
    for index in range(len(render_scene(names, SPEC, np.random.default_rng(seed)).names)):
        whole, without = render_without(index, names, seed)
        difference = np.abs(whole.picture.astype(int) - without.picture.astype(int)).sum(2)
        rows, columns = difference.any(1).nonzero()[0], difference.any(0).nonzero()[0]
        changed = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert np.abs(whole.boxes[index] - changed).max() <= 1, whole.names[index]
        # It can be seen: its pixels differ by more than three times the noise (5 per channel).
        assert np.median(difference[difference > 15]) > 3 * 5 * 3


def test_objects_lie_inside_the_picture_do_not_overlap_and_have_the_asked_size() -> None:
    for seed in range(30):
        scene = render_scene(
            list(MINIATURE_CLASSES[seed % 28 : seed % 28 + 4]), SPEC, np.random.default_rng(seed)
        )
        assert scene.picture.shape == (SPEC.size, SPEC.size, 3)
        assert scene.picture.dtype == np.uint8
        cover = np.zeros((SPEC.size, SPEC.size), int)
        for x0, y0, x1, y1 in scene.boxes.astype(int):
            assert 0 <= x0 < x1 <= SPEC.size
            assert 0 <= y0 < y1 <= SPEC.size
            assert SPEC.min_object_px <= max(x1 - x0, y1 - y0) <= SPEC.max_object_px
            cover[y0:y1, x0:x1] += 1
        assert cover.max() == 1


def test_the_first_object_is_drawn_even_where_the_others_find_no_place() -> None:
    crowded = replace(SPEC, min_object_px=120, max_object_px=128)
    scene = render_scene(["cow", "cat", "bus"], crowded, np.random.default_rng(0))
    assert scene.names == ["cow"]


# ------------------------------------------------------------------------------ the files


def test_training_annotations_hold_base_boxes_alone(world: World) -> None:
    content = world.read("train_base")
    assert [c["name"] for c in content["categories"]] == list(MINIATURE_BASE)
    assert [c["id"] for c in content["categories"]] == [
        MINIATURE_CLASSES.index(name) + 1 for name in MINIATURE_BASE
    ]
    found = boxes_by_image(content)
    assert len(found) == SPEC.train_images, "every training picture has a base object"
    for image_id, scene in enumerate(world.scenes["train"], start=1):
        expected = [
            (name, list(box))
            for name, box in zip(scene.names, scene.boxes.tolist(), strict=True)
            if name in MINIATURE_BASE
        ]
        assert found[image_id] == expected
        assert expected


def test_novel_objects_are_drawn_in_training_pictures_and_named_in_captions(world: World) -> None:
    images = world.read("train_base")["images"]
    named: set[str] = set()
    drawn: set[str] = set()
    for image, scene in zip(images, world.scenes["train"], strict=True):
        stored = np.asarray(Image.open(world.root / "train" / image["file_name"])).astype(int)
        # JPEG smooths the noise of 5 per channel; another scene is 40 and more away.
        assert np.abs(stored - scene.picture).mean() < 8, "the file shows the scene"
        drawn |= set(scene.names) & set(MINIATURE_NOVEL)
        mentioned = {w for caption in image["captions"] for w in words(caption)}
        mentioned &= set(MINIATURE_CLASSES)
        assert mentioned <= set(scene.names), "a caption names nothing that is not there"
        named |= mentioned & set(MINIATURE_NOVEL)
        assert len(image["captions"]) == SPEC.captions_per_image
    assert len(drawn) >= 4
    assert len(named) >= 4


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_files_partition_the_boxes(world: World, split: str) -> None:
    parts = {part: world.read(f"{split}_{part}") for part in ("base", "novel", "all")}
    for part, vocabulary in (("base", MINIATURE_BASE), ("novel", MINIATURE_NOVEL)):
        content = parts[part]
        assert [c["name"] for c in content["categories"]] == list(vocabulary)
        assert all(boxes_by_image(content).values()), "no picture without a box of the part"
    assert [c["name"] for c in parts["all"]["categories"]] == list(MINIATURE_CLASSES)

    def keys(part: str) -> set[tuple]:
        return {(a["image_id"], a["category_id"], *a["bbox"]) for a in parts[part]["annotations"]}

    assert keys("base") | keys("novel") == keys("all")
    assert not keys("base") & keys("novel")
    assert len(keys("all")) == sum(len(scene.names) for scene in world.scenes[split])
    for annotation in parts["all"]["annotations"]:
        assert annotation["area"] == annotation["bbox"][2] * annotation["bbox"][3]


def test_novel_probability_at_its_limits() -> None:
    for probability, expected in ((0.0, set(MINIATURE_BASE)), (1.0, set(MINIATURE_NOVEL))):
        spec = replace(SPEC, novel_probability=probability)
        for seed in range(20):
            first, *others = miniature._draw_names(spec, "train", np.random.default_rng(seed))
            assert first in MINIATURE_BASE
            assert set(others) <= expected


# ------------------------------------------------------------------------------ captions


def test_captions_name_each_class_with_the_given_probability() -> None:
    rng = np.random.default_rng(0)
    captions = make_captions(["cat", "airplane"], 2000, 0.75, rng)
    for name in ("cat", "airplane"):
        share = np.mean([name in words(caption) for caption in captions])
        # 0.75, and half of the captions for which both draws failed (0.25 x 0.25).
        assert share == pytest.approx(0.75 + 0.25**2 / 2, abs=0.03)
    assert all(words(caption) & {"cat", "airplane"} for caption in captions)
    both = [c for c in captions if {"cat", "airplane"} <= words(c)]
    first = np.mean([c.index("cat") < c.index("airplane") for c in both])
    assert first == pytest.approx(0.5, abs=0.06), "in any order"


def test_captions_are_grammatical_for_every_class() -> None:
    rng = np.random.default_rng(0)
    vowels = {"airplane", "apple", "elephant", "umbrella"}
    for name in MINIATURE_CLASSES:
        article = "an" if name in vowels else "a"
        for caption in make_captions([name], 6, 1.0, rng):
            assert re.search(rf"\b{article} {name}\b", caption), caption
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", caption), caption
    for caption in make_captions(["dog", "cat", "apple", "cat"], 10, 1.0, rng):
        assert re.search(r"an? \w+, an? \w+ and an? \w+\b", caption), caption
        assert len(words(caption) & {"dog", "cat", "apple"}) == 3
    for caption in make_captions(["cat", "dog", "apple"], 20, 0.0, rng):
        assert len(words(caption) & {"cat", "dog", "apple"}) == 1, "at least one"


# ------------------------------------------------------------------------------ making and keeping


def test_a_picture_depends_on_the_seed_and_not_on_how_many_there_are(
    world: World, tmp_path: Path
) -> None:
    small = replace(SPEC, train_images=3, val_images=2, test_images=2)
    ensure_miniature(tmp_path / "small", small)
    ensure_miniature(tmp_path / "other", replace(small, seed=4))
    ours, other, large = map(files_of, (tmp_path / "small", tmp_path / "other", world.root))
    pictures = [name for name in ours if name.endswith(".jpg")]
    assert len(pictures) == len({ours[name] for name in pictures}) == 7
    assert all(ours[name] == large[name] != other[name] for name in pictures)


def small_world(root: Path, seed: int = 0) -> MiniatureSpec:
    spec = MiniatureSpec(seed=seed, train_images=3, val_images=2, test_images=2)
    ensure_miniature(root, spec)
    return spec


def test_a_world_of_the_same_spec_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = small_world(tmp_path)
    monkeypatch.setattr(miniature, "render_scene", pytest.fail)
    assert ensure_miniature(tmp_path, spec) == tmp_path


def test_another_spec_replaces_the_world_and_leaves_other_files(tmp_path: Path) -> None:
    small_world(tmp_path, seed=0)
    (tmp_path / "teacher.pt").write_bytes(b"CLIP")
    before = files_of(tmp_path)
    small_world(tmp_path, seed=1)
    after = files_of(tmp_path)
    assert before.keys() == after.keys()
    assert after["train/00000.jpg"] != before["train/00000.jpg"]
    assert after["teacher.pt"] == b"CLIP"
    assert not list(tmp_path.glob(".making-*"))


def test_an_interrupted_call_leaves_the_old_world(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = small_world(tmp_path)
    before = files_of(tmp_path)
    scenes = iter([render_scene(["cow"], spec, np.random.default_rng(0))] * 4)

    def interrupted(*_: object) -> Scene:
        try:
            return next(scenes)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(miniature, "render_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ensure_miniature(tmp_path, replace(spec, seed=9))
    assert files_of(tmp_path) == before


def test_what_a_killed_process_left_is_no_obstacle(tmp_path: Path) -> None:
    left = tmp_path / f".making-{os.getpid()}" / "train"
    left.mkdir(parents=True)
    (left / "00099.jpg").write_bytes(b"half")
    small_world(tmp_path)
    assert len(list((tmp_path / "train").iterdir())) == 3
    assert not list(tmp_path.glob(".making-*"))


def test_a_world_without_its_pictures_is_made_anew(tmp_path: Path) -> None:
    spec = small_world(tmp_path)
    before = files_of(tmp_path)
    (tmp_path / "val" / "00001.jpg").unlink()
    shutil.rmtree(tmp_path / "test")
    ensure_miniature(tmp_path, spec)
    assert files_of(tmp_path) == before


def test_without_the_fonts_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    miniature._font.cache_clear()
    miniature._glyph.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '.\[miniature\]'"):
        ensure_miniature(tmp_path, SPEC)
    assert not files_of(tmp_path)
    assert not {"qtawesome", "qtpy"} & set(sys.modules), "its code is not needed"


# ------------------------------------------------------------------------------ registration


def test_registered_datasets_load_with_their_vocabulary(world: World) -> None:
    parts = ["train_base", *(f"{s}_{p}" for s in ("val", "test") for p in ("base", "novel", "all"))]
    names = [f"miniature_ovd_{part}" for part in parts]

    def forget() -> None:
        for name in names:
            DatasetCatalog.pop(name, None)
            MetadataCatalog.pop(name, None)

    forget()
    try:
        register_miniature(str(world.root.parent))
        register_miniature("elsewhere")  # names that are taken are left alone
        for name, part in zip(names, parts, strict=True):
            records, metadata = DatasetCatalog.get(name), MetadataCatalog.get(name)
            assert metadata.evaluator_type == "split_coco"
            assert tuple(metadata.base_classes) == MINIATURE_BASE
            assert tuple(metadata.novel_classes) == MINIATURE_NOVEL
            content = world.read(part)
            assert metadata.thing_classes == [c["name"] for c in content["categories"]]
            assert len(records) == len(content["images"])
            assert sum(len(r["annotations"]) for r in records) == len(content["annotations"])
            assert all(Path(record["file_name"]).is_file() for record in records)
        assert all(len(r["captions"]) == 5 for r in DatasetCatalog.get(names[0]))
    finally:
        forget()
        register_miniature()


def test_how_much_captions_name_changes_no_picture_and_no_box(world: World, tmp_path: Path) -> None:
    ensure_miniature(tmp_path, replace(SPEC, named_probability=0.0, val_images=1, test_images=1))
    ours, silent = files_of(world.root), files_of(tmp_path)
    assert all(silent[name] == ours[name] for name in silent if name.startswith("train/"))
    content = json.loads(silent["annotations/train_base.json"])
    assert content["annotations"] == world.read("train_base")["annotations"]
    captions = [caption for image in content["images"] for caption in image["captions"]]
    assert {len(words(caption) & set(MINIATURE_CLASSES)) for caption in captions} == {1}
