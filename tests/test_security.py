"""Every place where the program reads a file: planted code does not run, and the file is named.

Each plant makes a folder when it is loaded the usual way; the same readers take benign files.
"""

import ast
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.resnet import build_resnet_backbone

import open_clip_files
from hierkd.checkpoint import HierKDCheckpointer
from hierkd.load_config import load_config
from hierkd.teachers.clip import CLIPTeacher
from hierkd.teachers.region_cache import (
    CacheContents,
    RegionCache,
    RegionCacheWriter,
    keys_sha256,
    sorted_texts,
)
from hierkd.teachers.texts import load_text_embeddings


class Planted:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.fixture
def ran(tmp_path):
    return tmp_path / "ran"


@pytest.fixture
def model():
    return torch.nn.ModuleDict({"bottom_up": torch.nn.Conv2d(1, 2, 1)})


# ----------------------------------------------------------------- how a plant gets into a file


def torch_zip(path, planted):
    torch.save({"model": {"w": torch.zeros(1)}, "planted": planted}, path)


def torch_legacy(path, planted):
    content = {"model": {"w": torch.zeros(1)}, "planted": planted}
    torch.save(content, path, _use_new_zipfile_serialization=False)


def plain_pickle(path, planted):
    path.write_bytes(pickle.dumps({"model": {"w": planted}, "__author__": "x"}, 2))


def object_array(path, planted):
    with path.open("wb") as file:
        np.save(file, np.array([planted], dtype=object), allow_pickle=True)


def torchscript_with_pickle(path, planted):
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "constants.pkl"):
            archive.writestr(f"clip/{name}", pickle.dumps(planted, 2))
        archive.writestr("clip/version", "3")


def setting_off(plant, path):
    """What an unguarded reader of such a file does."""
    if plant in (torch_zip, torch_legacy):
        torch.load(path, weights_only=False)
    elif plant is plain_pickle:
        pickle.loads(path.read_bytes())
    elif plant is object_array:
        np.load(path, allow_pickle=True)
    else:
        pickle.loads(zipfile.ZipFile(path).read("clip/data.pkl"))


# -------------------------------------------------------------------------- what reads the files


def load_weights(path):
    HierKDCheckpointer(torch.nn.ModuleDict({"w": torch.nn.Linear(1, 1)})).load(str(path))


def resume(path):
    (path.parent / "last_checkpoint").write_text(path.name)
    HierKDCheckpointer(torch.nn.Linear(1, 1), str(path.parent)).resume_or_load("", resume=True)


def load_clip(path):
    CLIPTeacher(weights=str(path), device="cpu", precision="fp32").encode_captions(["a cat"])


def load_open_clip(path):
    """The planted file in place of a model's weights, in the folder of its config."""
    planted = path.read_bytes()
    folder = open_clip_files.write_folder(path.parent, name=path.name)
    path.write_bytes(planted)
    teacher = CLIPTeacher(weights=f"open_clip:{folder}", device="cpu", precision="fp32")
    teacher.encode_captions(["a cat"])


READERS = [
    *[(load_weights, plant, "model.pth") for plant in (torch_zip, torch_legacy, plain_pickle)],
    (load_weights, torchscript_with_pickle, "model.pth"),
    *[(load_weights, plant, "model.pkl") for plant in (plain_pickle, torch_legacy)],
    *[(load_weights, plant, "model.pyth") for plant in (torch_zip, plain_pickle)],
    *[(resume, plant, "model_0000041.pth") for plant in (torch_zip, torch_legacy, plain_pickle)],
    *[
        (load_clip, plant, "clip.pt")
        for plant in (torch_zip, torch_legacy, plain_pickle, torchscript_with_pickle)
    ],
    *[
        (load_open_clip, plant, "open_clip_pytorch_model.bin")
        for plant in (torch_zip, torch_legacy, plain_pickle, torchscript_with_pickle)
    ],
    (load_open_clip, plain_pickle, "open_clip_model.safetensors"),
    (load_text_embeddings, plain_pickle, "texts.safetensors"),
]


@pytest.mark.parametrize(
    ("read", "plant", "name"),
    READERS,
    ids=[f"{read.__name__}-{plant.__name__}-{name}" for read, plant, name in READERS],
)
def test_a_planted_pickle_does_not_run(tmp_path, ran, read, plant, name):
    path = tmp_path / name
    plant(path, Planted(ran))
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        read(path)
    assert not ran.exists()
    setting_off(plant, path)
    assert ran.is_dir()


@pytest.mark.parametrize("plant", [object_array, plain_pickle])
@pytest.mark.parametrize("name", ["regions.npy", "text_keys.npy"])
def test_a_planted_teacher_cache_does_not_run(tmp_path, ran, plant, name):
    texts, keys = sorted_texts(["a cat", "a dog"])
    contents = CacheContents(
        clip="tiny.pt", weights_sha256="ab" * 32, pixel_statistics="clip", image_format="RGB",
        crop_scale=1.5, datasets=["world"], annotations_sha256=["cd" * 32], embed_dim=2,
        logit_scale=14.0, num_boxes=1, num_texts=len(texts), texts_sha256=keys_sha256(keys),
    )  # fmt: skip
    ids, folder = np.array([3], np.int64), tmp_path / "cache"
    writer = RegionCacheWriter(folder, contents, ids, keys)
    writer.write_texts(np.eye(2, dtype=np.float32))
    writer.write_regions(np.eye(2, dtype=np.float32)[None])
    writer.finish()
    RegionCache(folder)
    plant(folder / name, Planted(ran))
    with pytest.raises(ValueError, match=name):
        RegionCache(folder)
    assert not ran.exists()


UNGUARDED = {"pickle.load", "pickle.loads", "cloudpickle.load", "torch.jit.load", "yaml.load",
             "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "torch.hub.load"}  # fmt: skip
GUARDED_BY = {"torch.load": "weights_only=True", "np.load": "allow_pickle=False"}


def test_no_module_of_the_project_unpickles():
    """A new call of an unguarded reader has to be made safe, or to be argued for here."""
    root = Path(__file__).resolve().parent.parent
    sources = [*root.glob("*.py"), *(root / "projects").rglob("*.py"), *root.glob("tools/*.py"),
               *root.glob("datasets/*.py")]  # fmt: skip
    guarded, unguarded = 0, []
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name, keywords = ast.unparse(node.func), [ast.unparse(k) for k in node.keywords]
            guard = GUARDED_BY.get(name)
            if name in UNGUARDED or (guard and guard not in keywords):
                unguarded.append(f"{path.relative_to(root)}:{node.lineno}: {ast.unparse(node)}")
            guarded += bool(guard)
    assert unguarded == []
    assert guarded >= 5


# ------------------------------------------------------------------------------ the benign files


def test_the_model_zoos_files_are_read(tmp_path, model):
    weights = {"bottom_up.weight": np.full((2, 1, 1, 1), 3.0, np.float32)}
    content = {"model": weights, "__author__": "torchvision", "matching_heuristics": True}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(content, 2))
    HierKDCheckpointer(model).load(str(tmp_path / "R-50.pkl"))
    assert torch.equal(model["bottom_up"].weight, torch.full((2, 1, 1, 1), 3.0))


@pytest.mark.parametrize("blobs", [True, False])
def test_caffe2s_files_are_read(tmp_path, blobs):
    # as those of detectron2://ImageNetPretrained/MSRA: Caffe2's names, matched by detectron2
    cfg = load_config("", ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", "18",
                           "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"])  # fmt: skip
    backbone = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    values = {
        "conv1_w": np.full((64, 3, 7, 7), 2.0, np.float32),
        "res2_0_branch2a_w": np.full((64, 64, 3, 3), 5.0, np.float32),
        "conv1_w_momentum": np.zeros((64, 3, 7, 7), np.float32),
    }
    content = {"blobs": values, "cfg": "text"} if blobs else values
    (tmp_path / "R-18.pkl").write_bytes(pickle.dumps(content, 2))
    HierKDCheckpointer(backbone).load(str(tmp_path / "R-18.pkl"))
    state = backbone.state_dict()
    assert state["stem.conv1.weight"].unique().item() == 2
    assert state["res2.0.conv1.weight"].unique().item() == 5


# -------------------------------------------------------------------------------------- configs

TAGS = {
    "apply": "!!python/object/apply:os.mkdir ['{ran}']",
    "eval": "!!python/object/apply:eval [\"__import__('os').mkdir('{ran}')\"]",
}


@pytest.mark.parametrize(
    ("tag", "where"), [("apply", "file"), ("eval", "file"), ("apply", "base"), ("eval", "base")]
)
def test_code_in_a_config_does_not_run(tmp_path, ran, tag, where):
    planted = f"OUTPUT_DIR: {TAGS[tag].format(ran=ran)}"
    (tmp_path / "base.yaml").write_text(planted if where == "base" else "OUTPUT_DIR: x")
    (tmp_path / "file.yaml").write_text(planted if where == "file" else "_BASE_: base.yaml")
    with pytest.raises(ValueError, match="python/") as error:
        load_config(str(tmp_path / "file.yaml"))
    assert str(tmp_path / f"{where}.yaml") in str(error.value)
    assert not ran.exists()
    yaml.unsafe_load(planted)
    assert ran.is_dir()
