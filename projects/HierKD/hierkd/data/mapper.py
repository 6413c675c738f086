"""From a dataset dict to the model's input: detectron2's mapper, plus one caption per step."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper, detection_utils
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from hierkd.data.resizing import ResizeShortestEdge

__all__ = [
    "HierKDDatasetMapper",
    "PictureState",
    "check_images",
    "look_at_pictures",
    "problem_of_picture",
    "read_picture",
]

_LOGGER = logging.getLogger(__name__)

# Pillow's names of pixels with more than 8 bits a channel. It turns them into RGB by cutting off
# all that is above 255, which leaves a picture of 16 bits white.
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


_ORIENTATION = 0x0112  # EXIF's tag


class HierKDDatasetMapper(DatasetMapper):  # type: ignore[misc]
    """detectron2's :class:`DatasetMapper`, plus ``caption``, and errors that name the image.

    In training with global distillation one of the image's captions is drawn uniformly at each
    step (§4.2) and put into the result as ``caption``. The draw uses numpy's global generator, as
    detectron2's augmentations do. The list ``captions`` itself is not passed on.

    With a cache of the teacher its answers travel with the batch: ``instances`` has
    ``gt_region_embeddings`` (M, D), a row per box, of the mirrored image where it is mirrored, and
    the result has ``caption_embedding`` (D,). Of a cache with proposals the result has
    ``proposals``, too: q instances with ``proposal_boxes`` and ``region_embeddings`` (q, D).
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        with_caption: bool,
        skip_broken_images: bool = False,
        with_regions: bool = False,
        cache: Any = None,
        **kwargs: Any,
    ) -> None:
        """Create the mapper; all but detectron2's own ``kwargs`` is for training alone.

        Args:
            is_train: Whether the result is for training (augmented, with ``instances``).
            with_caption: Whether to draw a caption.
            skip_broken_images: Leave out images that cannot be decoded (another image takes the
                place) instead of raising. At inference a result would silently be missing.
            with_regions: Whether to look up each box in the cache; ignored without one. Only
                resizing and mirroring are then possible: a cached embedding is of the whole box.
            cache: :class:`hierkd.teachers.region_cache.RegionCache`.
            **kwargs: See :class:`detectron2.data.DatasetMapper`.
        """
        kwargs["augmentations"] = list(map(_for_any_shape, kwargs["augmentations"]))
        super().__init__(is_train, **kwargs)
        self.with_caption = with_caption and is_train
        self.skip_broken_images = skip_broken_images and is_train
        self.cache: Any = cache if is_train else None
        self.with_regions = with_regions and self.cache is not None

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Return the constructor's arguments for ``cfg``; the cache is not among them.

        Raises:
            ValueError: ``MODEL.TEACHER.CACHE`` together with augmentations that it cannot follow.
        """
        cached = bool(cfg.MODEL.TEACHER.CACHE) and cfg.MODEL.IKD.LOSS_WEIGHT > 0
        if cached and is_train:
            _check_cacheable("INPUT.CROP.ENABLED", cfg.INPUT.CROP.ENABLED, (False,))
            _check_cacheable("INPUT.RANDOM_FLIP", cfg.INPUT.RANDOM_FLIP, ("horizontal", "none"))
        return {
            **super().from_config(cfg, is_train),
            "with_caption": cfg.MODEL.GKD.LOSS_WEIGHT > 0,
            "skip_broken_images": cfg.DATALOADER.SKIP_BROKEN_IMAGES,
            "with_regions": cached,
        }

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any] | None:
        """Read and augment one image.

        Args:
            dataset_dict: One image in detectron2's dataset format, maybe with ``captions``. It is
                not changed.

        Returns:
            ``image`` (3, H, W) uint8 in ``INPUT.FORMAT``, in training also ``instances``
            (``gt_boxes`` in absolute px of ``image``, ``gt_classes``), ``caption``, and the cache's
            embeddings of both; or ``None`` for an image that is left out.

        Raises:
            ValueError: The image cannot be decoded, has more than 8 bits a channel or another size
                than its dict says. It is named.
        """
        dataset_dict = dict(dataset_dict)
        captions = dataset_dict.pop("captions", [])
        name = dataset_dict["file_name"]
        found = _problem_of_header(name)
        result: dict[str, Any] = {}
        try:
            result = {} if found else super().__call__(dataset_dict)
        except Exception:
            _, found = _decode(name, "RGB")  # the file's fault, or that of what comes after it?
            if not found:
                raise
        if found and self.skip_broken_images:
            _LOGGER.warning("Skipped image %s, which cannot be decoded (%s).", name, found)
            return None
        if found:
            advice = ", or skip such images with DATALOADER.SKIP_BROKEN_IMAGES True"
            raise ValueError(
                f"Image {name} cannot be decoded ({found}). Replace the file"
                f"{advice if self.is_train else ''}."
            )
        if self.with_caption:
            caption = captions[np.random.randint(len(captions))]
            result["caption"] = caption
            if self.cache is not None and (known := self.cache.texts([caption])):
                result["caption_embedding"] = torch.from_numpy(known[caption])
        return result

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: Any, image_shape: tuple[int, int]
    ) -> None:
        """detectron2's, which also looks up the boxes in the cache."""
        if not self.with_regions:
            super()._transform_annotations(dataset_dict, transforms, image_shape)
            return
        annotations = [a for a in dataset_dict.pop("annotations") if not a.get("iscrowd", 0)]
        ids = np.array([annotation["id"] for annotation in annotations], np.int64)
        instances = detection_utils.annotations_to_instances(
            [
                detection_utils.transform_instance_annotations(each, transforms, image_shape)
                for each in annotations
            ],
            image_shape,
        )
        flips = sum(isinstance(each, T.HFlipTransform) for each in transforms.transforms)
        flipped = flips % 2 == 1
        rows = self.cache.regions(ids, flipped=flipped)
        instances.gt_region_embeddings = torch.from_numpy(rows)
        dataset_dict["instances"] = detection_utils.filter_empty_instances(instances)
        if self.cache.contents.proposals_per_image > 0:
            corners, rows = self.cache.proposals(ids, flipped=flipped)
            boxes = Boxes(torch.from_numpy(transforms.apply_box(corners)).float())
            boxes.clip(image_shape)
            dataset_dict["proposals"] = Instances(
                image_shape, proposal_boxes=boxes, region_embeddings=torch.from_numpy(rows)
            )


def _for_any_shape(augmentation: T.Augmentation) -> T.Augmentation:
    """The augmentation, with a resize that leaves at least a pixel in place of detectron2's."""
    if type(augmentation) is not T.ResizeShortestEdge:
        return augmentation
    return ResizeShortestEdge(
        augmentation.short_edge_length,
        augmentation.max_size,
        augmentation.sample_style,
        augmentation.interp,
    )


def _check_cacheable(key: str, found: object, allowed: tuple[object, ...]) -> None:
    if found not in allowed:
        raise ValueError(
            f"{key} is {found!r}, but MODEL.TEACHER.CACHE knows whole boxes and their mirror "
            f"images only: set {key} to {' or '.join(map(repr, allowed))}, or MODEL.TEACHER.CACHE "
            "''"
        )


def read_picture(file_name: str, image_format: str = "BGR") -> NDArray[np.uint8]:
    """Read a picture, (H, W, 3), 0..255, in ``image_format`` "BGR" or "RGB".

    Raises:
        ValueError: The file does not exist, cannot be decoded, or has more than 8 bits a channel
            in a way that Pillow does not reduce to 8. It is named.
    """
    image, problem = _decode(file_name, image_format)
    if image is None:
        raise ValueError(f"Image {file_name} cannot be decoded ({problem}).")
    return image


def _decode(file_name: str, image_format: str) -> tuple[NDArray[np.uint8] | None, str]:
    """Return the picture, (H, W, 3), or None and why it cannot be decoded."""
    if problem := _problem_of_header(file_name):
        return None, problem
    try:
        image = detection_utils.read_image(file_name, format=image_format)
        return np.array(image, np.uint8), ""
    # Beside OSError, a broken file gets anything out of Pillow's many decoders, from SyntaxError
    # (PNG) to NotImplementedError (DDS) and RuntimeError (AVIF).
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def _problem_of_header(file_name: str) -> str:
    """Return what the first bytes of a picture say against it; empty if nothing."""
    try:
        with Image.open(file_name) as image:
            return problem_of_picture(image)
    except Exception as error:  # as above
        return f"{type(error).__name__}: {error}"


def problem_of_picture(image: Image.Image) -> str:
    """Return what speaks against decoding an opened picture; empty if nothing."""
    if image.mode in _DEEP_MODES:
        return f"its pixels are {image.mode!r}, more than 8 bits; expected 8 bits a channel"
    if image.format == "EPS":  # a program, which Pillow would hand to Ghostscript
        return "an EPS document; expected a picture of pixels"
    return ""


def check_images(
    dataset_dicts: Sequence[dict[str, Any]], *, skip_broken: bool = False
) -> list[dict[str, Any]]:
    """Decode every image once, so that a broken one is noticed before training.

    Takes about 7 ms of one core per COCO image, shared among the processes of a run and the cores
    of the machine (Pillow releases the interpreter's lock).

    Returns:
        The dicts whose image can be decoded, in order; ``skip_broken`` logs the others.

    Raises:
        ValueError: An image cannot be decoded, or its size is not what its dict says. The first
            few are named.
    """
    share = dataset_dicts[comm.get_rank() :: comm.get_world_size()]
    found = [
        (
            f"{record['file_name']} ({state.broken})" if state.broken else "",
            f"{record['file_name']}: {state.mismatch}" if state.mismatch else "",
        )
        for record, state in zip(share, look_at_pictures(share), strict=True)
    ]
    # Nothing was raised so far: the other processes would wait here for the one that did.
    problems = [("", "")] * len(dataset_dicts)
    for rank, of_process in enumerate(comm.all_gather(found)):
        problems[rank :: comm.get_world_size()] = of_process
    if mismatched := [mismatch for _, mismatch in problems if mismatch]:
        raise ValueError(
            f"{len(mismatched):,} of {len(problems):,} images have another size than the "
            f"annotations say, first: {'; '.join(mismatched[:5])}."
        )
    broken = [problem for problem, _ in problems if problem]
    if not broken:
        return list(dataset_dicts)
    first = "; ".join(broken[:5])
    message = f"{len(broken):,} of {len(problems):,} images cannot be decoded, first: {first}."
    if not skip_broken:
        raise ValueError(
            f"{message} Replace them; training images can be skipped with "
            "DATALOADER.SKIP_BROKEN_IMAGES True."
        )
    _LOGGER.warning("Skipped: %s", message)
    return [each for each, found in zip(dataset_dicts, problems, strict=True) if not found[0]]


class PictureState(NamedTuple):
    """What decoding a picture showed."""

    broken: str  # why it cannot be decoded; empty if it can
    mismatch: str  # how its size differs from its dict's; empty if not
    digest: bytes  # of its pixels; empty if it cannot be decoded, or is not asked for


def look_at_pictures(
    dataset_dicts: Sequence[Mapping[str, Any]], *, with_digest: bool = False
) -> list[PictureState]:
    """Decode every picture, on all cores of this process; a progress bar shows it."""
    look = partial(_look_at_picture, with_digest)
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // comm.get_local_size())) as pool:
        states = pool.map(look, dataset_dicts)
        return list(tqdm(states, total=len(dataset_dicts), desc="checking images", delay=2))


def _look_at_picture(with_digest: bool, dataset_dict: Mapping[str, Any]) -> PictureState:
    name, mismatch, digest = dataset_dict["file_name"], "", b""
    image, problem = _decode(name, "RGB")
    if image is None:
        return PictureState(problem, "", b"")
    height, width = image.shape[:2]
    expected = (dataset_dict["width"], dataset_dict["height"])
    if (width, height) != expected:
        mismatch = f"got {width} x {height} px, expected {expected[0]} x {expected[1]}"
        if (height, width) == expected:
            with Image.open(name) as stored:
                turned = stored.getexif().get(_ORIENTATION, 1) > 4  # by a quarter
            cause = "EXIF orientation turns the picture" if turned else "swapped in the annotations"
            mismatch += f" (width and height: {cause})"
    if with_digest:
        pixels = image.tobytes() + str(image.shape).encode()
        digest = hashlib.blake2b(pixels, digest_size=16).digest()
    return PictureState("", mismatch, digest)
