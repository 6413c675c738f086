"""Filling a cache of the teacher: what CLIP says of every training box and caption (§3.2, §3.3)."""

from __future__ import annotations

import itertools
import logging
import os
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import check_image_size
from detectron2.modeling import build_model
from detectron2.structures import Boxes, BoxMode, Instances
from torch import Tensor
from tqdm import tqdm

from hierkd.checkpoint import HierKDCheckpointer
from hierkd.data.coco import check_datasets
from hierkd.data.mapper import read_picture
from hierkd.data.resizing import ResizeShortestEdge
from hierkd.files import file_hash
from hierkd.load_config import load_config
from hierkd.modeling.distillation import Proposals, choose_proposals
from hierkd.teachers.clip import CLIPTeacher, build_teacher, check_embed_dim
from hierkd.teachers.region_cache import (
    CacheContents,
    RegionCache,
    RegionCacheWriter,
    keys_sha256,
    sorted_texts,
)

__all__ = ["fill_cache"]

_LOGGER = logging.getLogger(__name__)

_TEXTS_PER_CHUNK = 1024  # encoded and written together. [ours]

DatasetDict = dict[str, Any]


def fill_cache(
    cfg: Any,
    folder: str | os.PathLike[str],
    *,
    images_per_chunk: int,
    num_threads: int | None,
    overwrite: bool,
    proposals_from: Sequence[str] = (),
) -> RegionCache:
    """Embed all boxes and captions of ``DATASETS.TRAIN``, and the prompts of all vocabularies.

    Goes on where an interrupted run of the same contents stopped. Boxes are those that training
    uses: no crowd regions. Crops are taken from the images as stored, at their full size.

    Args:
        cfg: config of the training.
        folder: of the cache.
        images_per_chunk: images encoded together; what an interruption may cost.
        num_threads: that read images ahead; None: one per core.
        overwrite: begin anew whatever the folder holds.
        proposals_from: config and weights of a class-agnostic detector, whose
            ``MODEL.IKD.PROPOSALS_PER_IMAGE`` best boxes of each image that overlap no labelled one
            are embedded, too; () if that is 0.

    Returns:
        The complete cache.

    Raises:
        ValueError: a dataset or an image is broken, the folder holds something else, or
            ``proposals_from`` does not fit the config.
        FileNotFoundError: a file is missing.
    """
    if not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN is empty: there is nothing to embed")
    if (k := cfg.MODEL.IKD.PROPOSALS_PER_IMAGE) > 0 and not proposals_from:
        raise ValueError(f"MODEL.IKD.PROPOSALS_PER_IMAGE is {k}: expected --proposals-from, too")
    if proposals_from and k == 0:
        raise ValueError("--proposals-from: expected MODEL.IKD.PROPOSALS_PER_IMAGE above 0, got 0")
    records = [
        record
        for name in cfg.DATASETS.TRAIN
        for record in check_datasets([name])
        if record["annotations"] or not cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    ]
    with_boxes = [record for record in records if _boxes_of(record)]
    ids = [annotation["id"] for record in with_boxes for annotation in _boxes_of(record)]
    if not ids:
        raise ValueError(f"{', '.join(cfg.DATASETS.TRAIN)}: no boxes but crowd regions")
    texts, keys = sorted_texts(_texts(cfg, records))
    proposer = _Proposer(cfg, *proposals_from) if proposals_from else None
    owners = [min(each["id"] for each in _boxes_of(r)) for r in with_boxes] if proposer else []
    with tempfile.TemporaryDirectory() as scratch:
        teacher = _build_clip(cfg, scratch)
        sizes = {"num_boxes": len(ids), "num_images": len(owners)}
        contents = _contents(cfg, teacher, proposer, keys, **sizes)
        arrays = np.array(ids, np.int64), keys, np.array(owners, np.int64)
        writer = RegionCacheWriter(folder, contents, *arrays, overwrite=overwrite)
        if writer.complete:
            _LOGGER.info("%s is complete already", folder)
        else:
            _encode_texts(teacher, texts, writer)
            _encode_boxes(cfg, teacher, proposer, with_boxes, writer, images_per_chunk, num_threads)
            writer.finish()
    return RegionCache(folder)


def _build_clip(cfg: Any, text_cache_dir: str) -> CLIPTeacher:
    """CLIP itself; its text cache is thrown away, since the texts go into the cache made here."""
    own = cfg.clone()
    own.defrost()
    own.MODEL.TEACHER.CACHE = own.MODEL.TEXT_CLASSIFIER.EMBEDDINGS = ""
    own.MODEL.TEACHER.TEXT_CACHE_DIR = text_cache_dir
    teacher = build_teacher(own)
    check_embed_dim(teacher, cfg.MODEL.TEXT_CLASSIFIER.EMBED_DIM)
    return teacher


def _contents(
    cfg: Any, teacher: CLIPTeacher, proposer: _Proposer | None, keys: Any, **sizes: int
) -> CacheContents:
    return CacheContents(
        clip=cfg.MODEL.TEACHER.WEIGHTS,
        weights_sha256=teacher.weights_digest,
        pixel_statistics=cfg.MODEL.TEACHER.PIXEL_STATISTICS,
        image_format=cfg.INPUT.FORMAT,
        crop_scale=float(cfg.MODEL.IKD.CROP_SCALE),
        datasets=list(cfg.DATASETS.TRAIN),
        annotations_sha256=[
            file_hash(MetadataCatalog.get(name).json_file) for name in cfg.DATASETS.TRAIN
        ],
        embed_dim=teacher.embed_dim,
        logit_scale=teacher.logit_scale,
        num_texts=len(keys),
        texts_sha256=keys_sha256(keys),
        proposals_per_image=cfg.MODEL.IKD.PROPOSALS_PER_IMAGE,
        proposals_sha256="" if proposer is None else proposer.weights_sha256,
        **sizes,
    )


def _texts(cfg: Any, records: Iterable[DatasetDict]) -> list[str]:
    """All captions, the prompts of all classes of the config's datasets, and the background's."""
    text = cfg.MODEL.TEXT_CLASSIFIER
    names = [
        name
        for dataset in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
        for name in MetadataCatalog.get(dataset).get("thing_classes", [])
    ]
    prompts = [
        template.format(name)
        for template in (text.TEMPLATES or (text.TEMPLATE,))
        for name in dict.fromkeys(names)
    ]
    captions = itertools.chain.from_iterable(record.get("captions", ()) for record in records)
    return [text.BACKGROUND_PROMPT, *prompts, *captions]


def _boxes_of(record: DatasetDict) -> list[DatasetDict]:
    return [each for each in record["annotations"] if not each.get("iscrowd", 0)]


def _encode_texts(teacher: CLIPTeacher, texts: Sequence[str], writer: RegionCacheWriter) -> None:
    with tqdm(total=len(texts), initial=writer.texts_done, desc="texts", unit="text") as progress:
        for start in range(writer.texts_done, len(texts), _TEXTS_PER_CHUNK):
            chunk = texts[start : start + _TEXTS_PER_CHUNK]
            writer.write_texts(teacher.encode_captions(chunk).cpu().numpy())
            progress.update(len(chunk))


def _encode_boxes(
    cfg: Any,
    teacher: CLIPTeacher,
    proposer: _Proposer | None,
    records: Sequence[DatasetDict],
    writer: RegionCacheWriter,
    images_per_chunk: int,
    num_threads: int | None,
) -> None:
    """Embed every box and proposal of the images as stored, and of their mirror images."""
    ends = np.cumsum([len(_boxes_of(record)) for record in records])
    done = int(np.searchsorted(ends, writer.boxes_done, side="right"))
    remaining, scale = records[done:], cfg.MODEL.IKD.CROP_SCALE
    progress = tqdm(total=int(ends[-1]), initial=writer.boxes_done, desc="boxes", unit="box")
    skip = cfg.DATALOADER.SKIP_BROKEN_IMAGES
    images = _read_ahead(remaining, cfg.INPUT.FORMAT, skip, num_threads or os.cpu_count() or 1)
    with progress:
        for start in range(0, len(remaining), images_per_chunk):
            chunk = remaining[start : start + images_per_chunk]
            pictures = list(itertools.islice(images, len(chunk)))
            boxes = [_corners_of(record) for record in chunk]
            if proposer is not None:
                found = [
                    labelled[:0] if picture is None else proposer(picture, labelled)
                    for picture, labelled in zip(pictures, boxes, strict=True)
                ]
                counts = np.array([[len(each)] for each in found])
                taken = np.arange(proposer.per_image) < counts  # (n, k)
                corners = np.zeros((*taken.shape, 4), np.float32)
                seen = np.zeros((*taken.shape, 2, teacher.embed_dim), np.float32)
                corners[taken] = torch.cat(found).numpy()
                seen[taken] = _embed(teacher, pictures, found, scale)
                writer.write_proposals(done + start, corners, seen)
            rows = _embed(teacher, pictures, boxes, scale)
            writer.write_regions(rows)
            progress.update(len(rows))


class _Proposer:
    """A trained class-agnostic detector, such as the RPN of Table 1."""

    def __init__(self, cfg: Any, config_file: str, weights: str) -> None:
        own = load_config(config_file, ["MODEL.DEVICE", cfg.MODEL.DEVICE])
        if own.MODEL.META_ARCHITECTURE != "ProposalNetwork":
            raise ValueError(
                f"--proposals-from {config_file}: MODEL.META_ARCHITECTURE is "
                f"{own.MODEL.META_ARCHITECTURE!r}, expected 'ProposalNetwork'"
            )
        self.model = build_model(own).eval()
        HierKDCheckpointer(self.model).load_detector(weights)
        self.weights_sha256 = file_hash(weights)
        self.per_image = cfg.MODEL.IKD.PROPOSALS_PER_IMAGE
        self.other_format = own.INPUT.FORMAT != cfg.INPUT.FORMAT
        self.resize = ResizeShortestEdge(own.INPUT.MIN_SIZE_TEST, own.INPUT.MAX_SIZE_TEST)

    @torch.no_grad()
    def __call__(self, picture: Tensor, labelled: Tensor) -> Tensor:
        """(q, 4) best boxes that overlap none of (m, 4); all XYXY in pixels of the picture."""
        pixels = picture.flip(0) if self.other_format else picture
        array = pixels.permute(1, 2, 0).numpy()
        resized = self.resize.get_transform(array).apply_image(array)
        image = torch.from_numpy(resized.transpose(2, 0, 1).copy())
        found = self.model([{"image": image}])[0]["proposals"].to("cpu")
        size = found.image_size
        scale = torch.tensor([size[1] / picture.shape[2], size[0] / picture.shape[1]]).repeat(2)
        same = torch.zeros(len(found), dtype=torch.int64)  # one image, no points
        best = choose_proposals(
            Proposals(same, same, found.proposal_boxes.tensor),
            found.objectness_logits,
            [Instances(size, gt_boxes=Boxes(labelled * scale))],
            self.per_image,
        )
        return best.boxes / scale


def _corners_of(record: DatasetDict) -> Tensor:
    """(m, 4) labelled boxes of an image, XYXY."""
    corners = [
        BoxMode.convert(each["bbox"], each["bbox_mode"], BoxMode.XYXY_ABS)
        for each in _boxes_of(record)
    ]
    return torch.tensor(corners, dtype=torch.float32)


def _embed(
    teacher: CLIPTeacher,
    pictures: Sequence[Tensor | None],
    boxes_of: Sequence[Tensor],
    crop_scale: float,
) -> Any:
    """(n, 2, D) embeddings of the n boxes of some images; zero where an image is missing."""
    images, boxes, known = [], [], []
    for picture, corners in zip(pictures, boxes_of, strict=True):
        known += [picture is not None] * len(corners)
        if picture is not None:
            images.append(picture)
            boxes.append(corners)
    mirrored = [
        torch.stack([i.shape[2] - b[:, 2], b[:, 1], i.shape[2] - b[:, 0], b[:, 3]], dim=1)
        for i, b in zip(images, boxes, strict=True)
    ]
    rows = np.zeros((len(known), 2, teacher.embed_dim), np.float32)
    found = teacher.encode_regions(
        [*images, *(image.flip(2) for image in images)], [*boxes, *mirrored], crop_scale
    )
    rows[np.array(known)] = torch.stack(found.cpu().chunk(2), dim=1).numpy() if images else 0
    return rows


def _read_ahead(
    records: Sequence[DatasetDict], image_format: str, skip_broken: bool, num_threads: int
) -> Iterator[Tensor | None]:
    """Images (3, H, W) in order, decoded by threads a little ahead of their use."""
    with ThreadPoolExecutor(num_threads) as pool:
        pending: deque[Future[Tensor | None]] = deque()
        for record in records:
            pending.append(pool.submit(_read, record, image_format, skip_broken))
            if len(pending) > 4 * num_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _read(record: DatasetDict, image_format: str, skip_broken: bool) -> Tensor | None:
    try:
        image = read_picture(record["file_name"], image_format)
    except ValueError as error:
        if not skip_broken:
            raise
        _LOGGER.warning("Skipped: %s", error)
        return None
    check_image_size(dict(record), image)
    return torch.from_numpy(image).permute(2, 0, 1)
