"""What the processes of test_ddp.py do. A module of its own, since spawned processes import it."""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import train_net
from fake_teacher import FakeTeacher
from hierkd.data.loader import build_resumable_train_loader
from hierkd.data.mapper import check_images
from hierkd.load_config import load_config
from hierkd.modeling import detector as meta_arch
from hierkd.modeling.mlca import gather_rows
from hierkd.training.launch import leave_groups
from tiny_training import CONFIG, command_line, miniature_at, own_log_handlers

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


def gathered_rows(rank: int) -> dict[str, Any]:
    """What ``gather_rows`` makes of rows of its own in every process, and what it refuses."""
    rows = torch.arange(6.0).reshape(2, 3).add(10 * rank)[: 2 - rank].requires_grad_()
    joined = gather_rows(rows)
    (joined * torch.arange(1.0, 4.0)[:, None]).sum().backward()
    try:
        gather_rows(torch.zeros(2, 3 + rank))
        refused = ""
    except ValueError as error:
        refused = str(error)
    nothing = gather_rows(torch.ones(1 - rank, 2))
    return {"joined": joined.detach(), "gradient": rows.grad, "refused": refused, "none": nothing}


def first_images(seed: int) -> list[int]:
    """Ids of the first 12 images that this process would train on, of 24 in all."""
    records = [{"image_id": i, "width": 4, "height": 3} for i in range(24)]
    loader = build_resumable_train_loader(
        records, lambda record: record, total_batch_size=6, num_workers=0, seed=seed
    )
    return [r["image_id"] for _, batch in zip(range(4), loader, strict=False) for r in batch]


def checked_images(folder: Path) -> str:
    """What this process is told of two pictures, of which the other process has the wrong one."""
    records = [
        {"file_name": str(folder / "miniature" / "train" / f"{i}.png"), "width": 96, "height": 96}
        for i in (1, 2)
    ]
    records[1]["height"] = 95
    try:
        check_images(records)
    except ValueError as error:
        return str(error)
    return "nothing"


def train(folder: Path) -> None:
    """``train_net.main``, keeping the weights of each process."""
    run_step = train_net.Trainer.run_step

    def keep_weights(self: Any) -> None:
        run_step(self)
        torch.save(self.model.module.state_dict(), folder / f"trained_{comm.get_rank()}.pth")

    train_net.Trainer.run_step = keep_weights
    with miniature_at(folder), own_log_handlers():
        arguments = command_line(folder / "output", folder / "clip.pt", "SOLVER.MAX_ITER", "2")
        train_net.main(default_argument_parser().parse_args(arguments))


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
    for gather in (False, True):
        detector = make_detector(**CONTRAST, **{"MODEL.GKD.GATHER": gather})
        model = DistributedDataParallel(detector, broadcast_buffers=False)
        images = make_batch(GATHERED_BATCH)
        results[f"gather {gather}"] = {
            name: losses_and_gradients(model, detector, [images[i] for i in shares[rank]])
            for name, shares in SHARES.items()
        }
    results["rows"] = gathered_rows(rank)
    results["checked"] = checked_images(folder)
    results["images"] = first_images(seed=3)
    results["images without a seed"] = first_images(seed=-1)
    torch.save(results, folder / f"{rank}.pth")
    del model
    meta_arch.build_teacher = train_net_teacher
    train(folder)
    dist.barrier()
    leave_groups()


train_net_teacher = meta_arch.build_teacher
