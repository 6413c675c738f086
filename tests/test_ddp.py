"""Training in several processes: two real ones with gloo on the CPU, against one with all images.

GKD equals that of one process only with ``MODEL.GKD.GATHER``; without it, each process contrasts
its own images, as in the paper.
"""

import itertools
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fake_teacher import FakeTeacher
from hierkd.load_config import load_config
from hierkd.modeling import detector as meta_arch
from hierkd.training.launch import leave_groups
from tiny_training import CONFIG

TIMEOUT = 300  # seconds; some ten are needed
SIZE = 96
CLASSES = ("ant", "bee", "cow")
NUM_PROCESSES = 2

# No batch statistics, which differ with the batch of a process by design, and no sampling.
OVERRIDES = {
    "MODEL.DEVICE": "cpu",
    "DATASETS.TRAIN": "()",
    "MODEL.TEXT_CLASSIFIER.EMBED_DIM": 8,
    "MODEL.SLIM_RESNET.WIDTHS": [8, 16, 24, 32],
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.RESNETS.NORM": "FrozenBN",
    "MODEL.FPN.NORM": "GN",
    "MODEL.ATSS.NORM": "GN",
    "MODEL.ATSS.NUM_CONVS": 1,
    "MODEL.ATSS.NEGATIVE_AMOUNT": 1.0,
    "MODEL.IKD.LOSS_WEIGHT": 1.0,
    "MODEL.IKD.IOU_THRESH": 0.0,
    "MODEL.IKD.MAX_CROPS_PER_IMAGE": 0,
    "MODEL.GKD.LOSS_WEIGHT": 0.0,
}

# Boxes and classes of the images of a batch; image i of the batch is process i's.
BATCHES: dict[str, list[tuple[list[list[float]], list[int]]]] = {
    "unequal": [
        ([[4, 6, 70, 72], [30, 20, 92, 88], [0, 40, 50, 90]], [0, 1, 2]),
        ([[10, 12, 60, 80]], [2]),
    ],
    "one without a box": [([], []), ([[4, 6, 70, 72], [30, 20, 92, 88]], [1, 0])],
    "none with a box": [([], []), ([], [])],
}

# The batch "one without a box" once more, with proposals, which both images have.
PROPOSALS = {"MODEL.IKD.PROPOSALS_PER_IMAGE": 2}

# For the contrast over all processes: GKD alone, with and without gathering.
CONTRAST = {"MODEL.IKD.LOSS_WEIGHT": 0.0, "MODEL.GKD.LOSS_WEIGHT": 0.7}
# Of the images of GATHERED_BATCH, those of each process.
GATHERED_BATCH = [*BATCHES["unequal"], *BATCHES["one without a box"]]
SHARES = {"equal": ((0, 1), (2, 3)), "unequal": ((0, 1, 2), (3,))}


class RegionTeacher(FakeTeacher):
    """Embeds a region by where it lies and by the mean colour of its image, smoothly."""

    def encode_regions(self, images: Any, boxes: Any, crop_scale: float) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(7, self.embed_dim, generator=generator)
        rows = [
            torch.cat([b / SIZE, x.float().mean(dim=(1, 2)).div(255).expand(len(b), 3)], dim=1)
            for x, b in zip(images, boxes, strict=True)
        ]
        return F.normalize(torch.cat(rows) @ weights, dim=1)


def make_detector(**more: Any) -> meta_arch.HierKD:
    """The same small detector in every process."""
    pairs = (OVERRIDES | more).items()
    cfg = load_config(CONFIG, [str(each) for pair in pairs for each in pair])
    meta_arch.build_teacher = lambda cfg: RegionTeacher(cfg.MODEL.TEXT_CLASSIFIER.EMBED_DIM)
    torch.manual_seed(0)
    model = build_model(cfg)
    model.set_vocabulary(CLASSES)
    return model.train()


def make_batch(objects: list[tuple[list[list[float]], list[int]]]) -> list[dict[str, Any]]:
    """The images of a batch, the same in every process."""
    batch = []
    for index, (boxes, classes) in enumerate(objects):
        instances = Instances((SIZE, SIZE))
        instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
        caption = f"what picture {index} shows"
        batch.append({"image": image, "instances": instances, "caption": caption})
    return batch


def losses_and_gradients(
    model: torch.nn.Module, detector: meta_arch.HierKD, batch: list[dict[str, Any]]
) -> dict[str, tuple[Tensor, dict[str, Tensor | None]]]:
    """Each loss and the gradient of it alone; ``total`` is their sum."""
    with EventStorage():
        names = list(model(batch))
    results = {}
    for name in [*names, "total"]:
        detector.zero_grad()
        with EventStorage():
            losses = model(batch)
        # the others with weight zero: DDP waits for the gradient of every parameter
        sum(v * float(name in (k, "total")) for k, v in losses.items()).backward()
        gradients = {
            k: None if p.grad is None else p.grad.clone()
            for k, p in detector.named_parameters()
            if p.requires_grad
        }
        value = torch.stack([v.detach() for k, v in losses.items() if name in (k, "total")]).sum()
        results[name] = (value, gradients)
    return results


def process(rank: int, folder: Path) -> None:
    """All that one of the two processes does; leaves ``<rank>.pth`` in ``folder``."""
    torch.set_num_threads(1)
    os.environ["HIERKD_CACHE"] = str(folder / "cache")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=NUM_PROCESSES
    )
    comm.create_local_process_group(NUM_PROCESSES)
    detector = make_detector()
    model = DistributedDataParallel(detector, broadcast_buffers=False)  # as detectron2 wraps it
    results: dict[str, Any] = {
        name: losses_and_gradients(model, detector, [make_batch(objects)[rank]])
        for name, objects in BATCHES.items()
    }
    detector = make_detector(**PROPOSALS)
    model = DistributedDataParallel(detector, broadcast_buffers=False)
    image = make_batch(BATCHES["one without a box"])[rank]
    results["proposals"] = losses_and_gradients(model, detector, [image])
    for gather in (False, True):
        detector = make_detector(**CONTRAST, **{"MODEL.GKD.GATHER": gather})
        model = DistributedDataParallel(detector, broadcast_buffers=False)
        images = make_batch(GATHERED_BATCH)
        results[f"gather {gather}"] = {
            name: losses_and_gradients(model, detector, [images[i] for i in shares[rank]])
            for name, shares in SHARES.items()
        }
    torch.save(results, folder / f"{rank}.pth")
    dist.barrier()
    leave_groups()


# ------------------------------------------------------------------------------ what they left


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What both processes left. They are ended, and the tests fail, if they wait for each other."""
    root = tmp_path_factory.mktemp("ddp")
    context = torch.multiprocessing.start_processes(
        process, (root,), nprocs=NUM_PROCESSES, join=False, start_method="fork"
    )
    deadline = time.monotonic() + TIMEOUT
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f"no end after {TIMEOUT} s"
    finally:
        for each in context.processes:
            each.kill()
    return root


@pytest.fixture(scope="module")
def results(folder):
    return [torch.load(folder / f"{rank}.pth") for rank in range(NUM_PROCESSES)]


@pytest.fixture(scope="module")
def run_alone():
    """Losses and gradients of one process that has the whole batch."""

    def _run(objects, **overrides):
        with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
            # put back what make_detector replaces
            patch.setattr(meta_arch, "build_teacher", None)
            detector = make_detector(**overrides)
        batch = make_batch(objects)
        return losses_and_gradients(detector, detector, batch)

    return _run


@pytest.fixture(scope="module")
def alone(run_alone):
    """The same of one process that has the whole batch."""
    found = {name: run_alone(objects) for name, objects in BATCHES.items()}
    return found | {"proposals": run_alone(BATCHES["one without a box"], **PROPOSALS)}


@pytest.mark.parametrize(
    ("loss", "batch"),
    [
        *itertools.product(
            ["loss_cls", "loss_box_reg", "loss_iou", "loss_ikd", "total"],
            ["unequal", "one without a box"],
        ),
        ("loss_ikd", "proposals"),
        ("loss_cls", "none with a box"),  # the normaliser is then 1 for both together
    ],
)
def test_gradients_are_those_of_one_process(results, alone, batch, loss):
    value, expected = alone[batch][loss]
    assert value > 0
    assert any(gradient.abs().max() > 1e-4 for gradient in expected.values())
    for result in results:
        _, gradients = result[batch][loss]
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            rounding = 1e-5 * max(1.0, expected[name].abs().max().item())
            torch.testing.assert_close(
                gradient,
                expected[name],
                rtol=1e-4,
                atol=rounding,
                msg=lambda m, n=name: f"{n}: {m}",
            )
    mean = sum(result[batch][loss][0] for result in results) / NUM_PROCESSES
    torch.testing.assert_close(mean, value, rtol=1e-5, atol=1e-6)


def test_a_process_without_any_box(results):
    losses = results[0]["one without a box"]
    assert losses["loss_cls"][0] > 0
    assert [losses[name][0].item() for name in ("loss_box_reg", "loss_iou", "loss_ikd")] == [0] * 3
    assert results[0]["proposals"]["loss_ikd"][0] > 0


# ------------------------------------------------------------------------------ gathered contrast

GKD_LOSSES = ("loss_gkd_image", "loss_gkd_caption")


@pytest.fixture(scope="module")
def contrasted_alone(run_alone):
    return run_alone(GATHERED_BATCH, **CONTRAST)


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("loss", GKD_LOSSES)
def test_gathered_contrast_is_that_of_one_process(results, contrasted_alone, shares, loss):
    expected_value, expected = contrasted_alone[loss]
    assert expected["head.embedding.weight"].abs().max() > 1e-4
    assert expected["mlca.logit_scale"].abs() > 1e-4
    for result in results:
        value, gradients = result["gather True"][shares][loss]
        torch.testing.assert_close(value, expected_value, rtol=1e-5, atol=1e-6)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            difference = (gradient - expected[name]).norm()
            assert difference <= 1e-4 * expected[name].norm() + 1e-8, name


def test_without_gathering_each_process_contrasts_its_own(results, contrasted_alone):
    first, second = (result["gather False"]["equal"]["loss_gkd_image"][0] for result in results)
    assert abs(first - second) > 1e-3
    whole = contrasted_alone["loss_gkd_image"][0]
    assert (first + second) / 2 < 0.9 * whole  # two pairs are easier to tell apart than four
    # one image alone has nothing to be told from
    assert results[1]["gather False"]["unequal"]["loss_gkd_image"][0] == 0
