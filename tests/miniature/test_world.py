"""The rendered world: what is drawn, what is written down, and when it is made anew."""

import importlib.util
import json
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
    ensure_miniature,
    make_captions,
    register_miniature,
    render_scene,
)

SPEC = MiniatureSpec(seed=3, train_images=24, val_images=8, test_images=8)
SMALL = replace(SPEC, train_images=3, val_images=2, test_images=2)


class World:
    """A world on disk, and the scenes it was written from: ``scenes[split]``."""

    def __init__(self, root):
        self.root, drawn = root, []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                miniature,
                "render_scene",
                lambda *arguments: drawn.append(render_scene(*arguments)) or drawn[-1],
            )
            ensure_miniature(root, SPEC)
        self.scenes = {"train": drawn[:24], "val": drawn[24:32], "test": drawn[32:]}

    def read(self, part):
        return json.loads((self.root / "annotations" / f"{part}.json").read_text())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world") / "miniature")


def files_of(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def boxes_by_image(content):
    """Class name and XYXY box of every annotation."""
    names = {category["id"]: category["name"] for category in content["categories"]}
    found = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        found[annotation["image_id"]].append(
            (names[annotation["category_id"]], [x, y, x + w, y + h])
        )
    return found


def words(text):
    return set(re.findall(r"[a-z]+", text))


# ------------------------------------------------------------------------------ what is drawn


def test_there_are_24_base_and_8_novel_classes_and_their_ids_alternate():
    assert (len(MINIATURE_BASE), len(MINIATURE_NOVEL)) == (24, 8)
    assert tuple(sorted({*MINIATURE_BASE, *MINIATURE_NOVEL})) == MINIATURE_CLASSES
    novel_ids = sorted(MINIATURE_CLASSES.index(name) for name in MINIATURE_NOVEL)
    assert novel_ids[0] < 24, "novel classes must not all come last"
    assert max(np.diff(novel_ids)) > 1


def test_every_design_has_ink_and_no_two_classes_look_the_same():
    owners = [name for name, glyphs in miniature._GLYPHS.items() for _ in glyphs]
    masks = [miniature._glyph(each) for glyphs in miniature._GLYPHS.values() for each in glyphs]
    assert all(0.05 < mask.mean() < 0.95 for mask in masks)
    flat = np.stack([cv2.resize(mask, (32, 32)) > 0.5 for mask in masks]).reshape(len(masks), -1)
    iou = (flat[:, None] & flat[None]).sum(2) / (flat[:, None] | flat[None]).sum(2)
    other_class = np.array([[a != b for b in owners] for a in owners])
    assert (iou * other_class).max() < 0.9


@pytest.mark.parametrize("seed", range(2))
def test_a_box_is_tight_around_the_pixels_that_its_object_changes(seed, monkeypatch):
    names = [str(name) for name in np.random.default_rng(seed).choice(MINIATURE_CLASSES, 3)]
    whole = render_scene(names, SPEC, np.random.default_rng(seed))
    paint = miniature._paint
    for index in range(len(whole.names)):
        count = iter(range(len(names)))

        def paint_but_one(picture, *rest, index=index, count=count):
            paint(picture.copy() if next(count) == index else picture, *rest)

        monkeypatch.setattr(miniature, "_paint", paint_but_one)
        without = render_scene(names, SPEC, np.random.default_rng(seed))
        difference = np.abs(whole.picture.astype(int) - without.picture.astype(int)).sum(2)
        rows, columns = difference.any(1).nonzero()[0], difference.any(0).nonzero()[0]
        changed = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert np.abs(whole.boxes[index] - changed).max() <= 1, whole.names[index]
        # It can be seen: its pixels differ by more than three times the noise (5 per channel).
        assert np.median(difference[difference > 15]) > 3 * 5 * 3


def test_objects_lie_inside_the_picture_do_not_overlap_and_have_the_asked_size():
    for seed in range(20):
        names = MINIATURE_CLASSES[seed % 28 : seed % 28 + 4]
        scene = render_scene(names, SPEC, np.random.default_rng(seed))
        assert (scene.picture.shape, scene.picture.dtype) == ((SPEC.size, SPEC.size, 3), np.uint8)
        cover = np.zeros((SPEC.size, SPEC.size), int)
        for x0, y0, x1, y1 in scene.boxes.astype(int):
            assert 0 <= x0 < x1 <= SPEC.size
            assert 0 <= y0 < y1 <= SPEC.size
            assert SPEC.min_object_px <= max(x1 - x0, y1 - y0) <= SPEC.max_object_px
            cover[y0:y1, x0:x1] += 1
        assert cover.max() == 1


def test_captions_name_each_class_with_the_given_probability():
    captions = make_captions(["cat", "airplane"], 1000, 0.75, np.random.default_rng(0))
    for name in ("cat", "airplane"):
        share = np.mean([name in words(caption) for caption in captions])
        # 0.75, and half of the captions for which both draws failed (0.25 x 0.25).
        assert share == pytest.approx(0.75 + 0.25**2 / 2, abs=0.04)
    assert all(words(caption) & {"cat", "airplane"} for caption in captions)
    assert all(re.search(r"\ba cat\b|\ban airplane\b", caption) for caption in captions)


# ------------------------------------------------------------------------------ the files


def test_training_annotations_hold_base_boxes_alone(world):
    content = world.read("train_base")
    assert [(c["id"], c["name"]) for c in content["categories"]] == [
        (MINIATURE_CLASSES.index(name) + 1, name) for name in MINIATURE_BASE
    ]
    found = boxes_by_image(content)
    assert len(found) == SPEC.train_images, "every training picture has a base object"
    for image_id, scene in enumerate(world.scenes["train"], start=1):
        drawn = zip(scene.names, scene.boxes.tolist(), strict=True)
        assert found[image_id] == [(name, box) for name, box in drawn if name in MINIATURE_BASE]


def test_novel_objects_are_drawn_in_training_pictures_and_named_in_captions(world):
    named, drawn = set(), set()
    images = world.read("train_base")["images"]
    for image, scene in zip(images, world.scenes["train"], strict=True):
        stored = np.asarray(Image.open(world.root / "train" / image["file_name"])).astype(int)
        # JPEG smooths the noise of 5 per channel; another scene is 40 and more away.
        assert np.abs(stored - scene.picture).mean() < 8, "the file shows the scene"
        drawn |= set(scene.names) & set(MINIATURE_NOVEL)
        mentioned = words(" ".join(image["captions"])) & set(MINIATURE_CLASSES)
        assert mentioned <= set(scene.names), "a caption names nothing that is not there"
        named |= mentioned & set(MINIATURE_NOVEL)
        assert len(image["captions"]) == SPEC.captions_per_image
    assert min(len(drawn), len(named)) >= 4


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_files_partition_the_boxes(world, split):
    keys = {}
    for part, vocabulary in miniature._VOCABULARIES.items():
        content = world.read(f"{split}_{part}")
        assert [c["name"] for c in content["categories"]] == list(vocabulary)
        assert all(boxes_by_image(content).values()), "no picture without a box of the part"
        assert all(a["area"] == a["bbox"][2] * a["bbox"][3] for a in content["annotations"])
        keys[part] = {(a["image_id"], a["category_id"], *a["bbox"]) for a in content["annotations"]}
    assert keys["base"] | keys["novel"] == keys["all"]
    assert not keys["base"] & keys["novel"]
    assert len(keys["all"]) == sum(len(scene.names) for scene in world.scenes[split])


def test_registered_datasets_load_with_their_vocabulary(world):
    parts = ["train_base", *(f"{s}_{p}" for s in ("val", "test") for p in ("base", "novel", "all"))]

    def register(root):
        for part in parts:
            DatasetCatalog.pop(f"miniature_ovd_{part}")
            MetadataCatalog.pop(f"miniature_ovd_{part}")
        register_miniature(root)

    register(str(world.root.parent))
    try:
        for part in parts:
            records = DatasetCatalog.get(f"miniature_ovd_{part}")
            metadata = MetadataCatalog.get(f"miniature_ovd_{part}")
            assert tuple(metadata.base_classes) == MINIATURE_BASE
            assert tuple(metadata.novel_classes) == MINIATURE_NOVEL
            content = world.read(part)
            assert metadata.thing_classes == [c["name"] for c in content["categories"]]
            assert len(records) == len(content["images"])
            assert sum(len(r["annotations"]) for r in records) == len(content["annotations"])
            assert all(Path(record["file_name"]).is_file() for record in records)
    finally:
        register(None)


# ------------------------------------------------------------------------------ making and keeping


def test_a_picture_depends_on_the_seed_and_not_on_numbers_and_captions(world, tmp_path):
    for name, spec in (
        ("small", replace(SMALL, named_probability=0.0)),
        ("other", replace(SMALL, seed=4)),
    ):
        ensure_miniature(tmp_path / name, spec)
    ours, other, large = map(files_of, (tmp_path / "small", tmp_path / "other", world.root))
    pictures = [name for name in ours if name.endswith(".jpg")]
    assert len(pictures) == len({ours[name] for name in pictures}) == 7
    assert all(ours[name] == large[name] != other[name] for name in pictures)
    content = json.loads(ours["annotations/train_base.json"])
    captions = [caption for image in content["images"] for caption in image["captions"]]
    assert {len(words(caption) & set(MINIATURE_CLASSES)) for caption in captions} == {1}


def test_another_spec_replaces_the_world_and_leaves_other_files(tmp_path, monkeypatch):
    ensure_miniature(tmp_path, SMALL)
    (tmp_path / "teacher.pt").write_bytes(b"CLIP")
    before = files_of(tmp_path)
    ensure_miniature(tmp_path, replace(SMALL, seed=1))
    after = files_of(tmp_path)
    assert before.keys() == after.keys()
    assert after["train/00000.jpg"] != before["train/00000.jpg"]
    assert after["teacher.pt"] == b"CLIP"
    monkeypatch.setattr(miniature, "render_scene", pytest.fail)
    ensure_miniature(tmp_path, replace(SMALL, seed=1))


def test_an_interrupted_call_leaves_the_old_world(tmp_path, monkeypatch):
    ensure_miniature(tmp_path, SMALL)
    before = files_of(tmp_path)
    scenes = iter([render_scene(["cow"], SMALL, np.random.default_rng(0))] * 4)
    monkeypatch.setattr(miniature, "render_scene", lambda *_: next(scenes))
    with pytest.raises(StopIteration):
        ensure_miniature(tmp_path, replace(SMALL, seed=9))
    assert files_of(tmp_path) == before


def test_a_world_without_its_pictures_is_made_anew(tmp_path):
    ensure_miniature(tmp_path, SMALL)
    before = files_of(tmp_path)
    (tmp_path / "val" / "00001.jpg").unlink()
    shutil.rmtree(tmp_path / "test")
    ensure_miniature(tmp_path, SMALL)
    assert files_of(tmp_path) == before


def test_without_the_fonts_the_error_says_what_to_install(tmp_path, monkeypatch):
    miniature._font.cache_clear()
    miniature._glyph.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '.\[miniature\]'"):
        ensure_miniature(tmp_path, SPEC)
    assert not files_of(tmp_path)
    assert not {"qtawesome", "qtpy"} & set(sys.modules), "its code is not needed"
