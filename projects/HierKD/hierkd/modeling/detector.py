"""HierKD: the ATSS detector of §3.1 with its two distillations, §3.2 (IKD) and §3.3 (GKD).

Shape letters, used in this file and nowhere redefined:

    N   images in the batch             L   feature levels, finest first
    R   anchors per image, one a point  D   embedding size (512 for CLIP ViT-B/32)
    K   classes of the vocabulary, index K is the background
    M   ground-truth boxes of an image  n   points of the classification loss
    p   positive points of the batch    P   distilled points of the batch
    C   captions of the batch (= N)

Names: ``pred_embeddings`` (f in the paper, L2-normalised) is the one value used several times:
classified, distilled per point, distilled globally. ``pred_anchor_deltas``, ``gt_labels`` and
``matched_gt_boxes`` are detectron2's. Boxes are XYXY in absolute pixels of the network input until
``detector_postprocess``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from detectron2.config import configurable
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator, build_anchor_generator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.meta_arch.dense_detector import DenseDetector, permute_to_N_HWA_K
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from detectron2.utils.logger import log_first_n
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.nn import functional as F

from hierkd.evaluation.transfer import find_overlap
from hierkd.modeling.atss import ATSSMatcher
from hierkd.modeling.detector_settings import (
    IKD,
    DetectionSettings,
    InferenceSettings,
    check_choice,
)
from hierkd.modeling.distillation import (
    PositivePoints,
    RegionPairs,
    choose_crops,
    region_loss,
)
from hierkd.modeling.gathering import gather_rows
from hierkd.modeling.head import ATSSHead
from hierkd.modeling.inference import ClassProbabilities, best_pairs, nms_of_classes
from hierkd.modeling.input_checks import check_ground_truth
from hierkd.modeling.losses import (
    box_iou_targets,
    centerness_targets,
    image_caption_contrastive_loss,
    positive_pairs_loss,
    quality_loss,
    softmax_focal_loss,
    weighted_giou_loss,
)
from hierkd.modeling.mlca import MLCA
from hierkd.modeling.sampling import subsample_negatives
from hierkd.modeling.text_classifier import TextClassifier
from hierkd.teachers.cached_teacher import CachedTeacher, build_cached_teacher
from hierkd.teachers.teacher import Teacher, build_teacher, check_embed_dim
from hierkd.teachers.texts import check_names

__all__ = ["ForeAnchors", "HierKD"]

logger = logging.getLogger(__name__)

PredictedMaps = tuple[list[Tensor], list[Tensor], list[Tensor] | None]  # what ATSSHead returns


class DensePredictions(NamedTuple):
    """The head's outputs with the levels and the map dimensions flattened to R points."""

    embeddings: Tensor  # (N, R, D), L2-normalised
    anchor_deltas: Tensor  # (N, R, 4)
    qualities: Tensor | None  # (N, R) logits

    def at(self, index: int | Tensor) -> DensePredictions:
        """The same of one image, without N; or, of one image, of some points."""
        return DensePredictions(
            self.embeddings[index],
            self.anchor_deltas[index],
            None if self.qualities is None else self.qualities[index],
        )


class ForeAnchors(NamedTuple):
    """The A anchors of an image that inference ranks: the best of each level, finest first."""

    boxes: Tensor  # (A, 4) decoded, clipped to the image
    classes: ClassProbabilities  # (A, K), the background left out
    qualities: Tensor  # (A,) 0..1; ones without a quality branch

    @property
    def probs(self) -> Tensor:
        """(A, K) all class probabilities as one array, however large that is."""
        return self.classes.whole

    @property
    def scores(self) -> Tensor:
        """(A,) score of each anchor's best class."""
        return self.classes.best * self.qualities

    def best(self, count: int) -> ForeAnchors:
        """The ``count`` best over all levels; all of them where there are no more."""
        if count >= len(self.boxes):
            return self
        top = self.scores.topk(count).indices
        return ForeAnchors(self.boxes[top], self.classes.select(top), self.qualities[top])


def _average_over_processes(values: Tensor) -> Tensor:
    """Mean over the processes of a vector of normalisers."""
    world_size = comm.get_world_size()
    if world_size > 1:
        torch.distributed.all_reduce(values)
    return values.div_(world_size)


def _half_precision(device: torch.device, *, enabled: bool) -> AbstractContextManager[Any]:
    """Autocast to the half precision that is fast there: float16 on a GPU, bfloat16 on a CPU.

    Without ``enabled`` the precision stays what it is, also inside somebody else's autocast.
    """
    if not enabled:
        return nullcontext()
    dtype = torch.bfloat16 if device.type == "cpu" else torch.float16
    return torch.autocast(device.type, dtype=dtype)


def _maps_of(
    backbone: nn.Module, head: nn.Module, head_in_features: list[str], images: Tensor
) -> tuple[list[Tensor], PredictedMaps]:
    """The L feature maps of (N, 3, H, W) images and the head's outputs on them."""
    by_name = backbone(images)
    features = [by_name[f] for f in head_in_features]
    return features, head(features)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` of a function: for the first size of images by itself, then for any."""
    result: Callable[..., Any] = torch.compile(function)
    return result


_overlap = lru_cache(maxsize=64)(find_overlap)


@META_ARCH_REGISTRY.register()
class HierKD(DenseDetector):  # type: ignore[misc]  # detectron2 is untyped
    """Open-vocabulary one-stage detector.

    Training reads the dataset dicts of :class:`hierkd.data.mapper.HierKDDatasetMapper`:
    ``image`` (3, H, W) raw, ``instances`` with ``gt_boxes`` and ``gt_classes`` (base classes only),
    and ``caption`` (str) when GKD is on. It returns true losses only, already weighted.
    Inference returns detectron2's standard output; ``pred_classes`` index
    :attr:`vocabulary_names`.

    The teacher is a guest, a plain object: it is in no ``state_dict`` and inference does not
    touch it, except to embed a new vocabulary.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: ATSSHead,
        head_in_features: Sequence[str],
        text_classifier: TextClassifier,
        anchor_generator: DefaultAnchorGenerator,
        box2box_transform: Box2BoxTransform,
        anchor_matcher: ATSSMatcher,
        teacher: Teacher | None,
        detection: DetectionSettings,
        inference: InferenceSettings,
        ikd: IKD | None,
        mlca: MLCA | None,
        gkd_loss_weight: float,
        vocabulary: Sequence[str],
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        channels_last: bool = False,
        amp_test: bool = False,
        compile_test: bool = False,
        gather_captions: bool = False,
        region_cache: CachedTeacher | None = None,
    ) -> None:
        """Assemble the detector from its parts.

        Args:
            backbone: a detectron2 backbone.
            head: the dense head.
            head_in_features: names of the backbone's maps, finest first.
            text_classifier: the cosine classifier.
            anchor_generator: one square anchor per point.
            box2box_transform: detectron2's delta transform.
            anchor_matcher: the ATSS assigner.
            teacher: CLIP behind the ``Teacher`` protocol; None if neither distillation nor a new
                vocabulary by name is wanted.
            detection: numbers of the §3.1 losses.
            inference: numbers of inference.
            ikd: instance-level distillation, None = off.
            mlca: the matcher of global-level distillation, None = off.
            gkd_loss_weight: lambda_Glo.
            vocabulary: class names of the training set, in contiguous-id order; may be empty, then
                :meth:`set_vocabulary` comes before the first batch.
            pixel_mean: per channel, in the order of the input image.
            pixel_std: likewise.
            channels_last: keep maps in channels-last memory order.
            amp_test: run backbone and head in half precision in inference.
            compile_test: run them through ``torch.compile`` in inference.
            gather_captions: contrast images and captions over all processes.
            region_cache: what CLIP sees in the ground-truth boxes, known beforehand; None = the
                teacher looks at each step.
        """
        super().__init__(
            backbone, head, list(head_in_features), pixel_mean=pixel_mean, pixel_std=pixel_std
        )
        self.text_classifier = text_classifier
        self.anchor_generator = anchor_generator
        if any(n != 1 for n in anchor_generator.num_anchors):
            raise ValueError(
                "MODEL.ANCHOR_GENERATOR must give one anchor per point, got "
                f"{anchor_generator.num_anchors} per level"
            )
        self.box2box_transform = box2box_transform
        self.anchor_matcher = anchor_matcher
        self.teacher = teacher
        self.detection = detection
        self.inference_settings = inference
        self.ikd = ikd
        self.mlca = mlca
        self.gkd_loss_weight = gkd_loss_weight
        self.gather_captions = gather_captions
        self.region_cache = region_cache
        self.amp_test = amp_test
        self.compile_test = compile_test
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        # w of the learned classification weight: loss exp(-w) * L + |w|
        self.cls_loss_log_weight = (
            nn.Parameter(torch.tensor(detection.cls_loss_weight))
            if detection.learn_cls_loss_weight
            else None
        )
        self.training_vocabulary = tuple(vocabulary)
        self.vocabulary_names: tuple[str, ...] = ()
        if vocabulary:
            self.set_vocabulary(vocabulary)
        self.to(memory_format=self.memory_format)

    @classmethod
    def from_config(cls, cfg: Any) -> dict[str, Any]:
        """Read the config: the only place in this file that knows ``cfg``."""
        backbone = build_backbone(cfg)
        shapes = [backbone.output_shape()[f] for f in cfg.MODEL.ATSS.IN_FEATURES]
        cached = build_cached_teacher(cfg) if cfg.MODEL.TEACHER.CACHE else None
        teacher: Teacher = cached or build_teacher(cfg)
        text = cfg.MODEL.TEXT_CLASSIFIER
        check_embed_dim(teacher, text.EMBED_DIM)
        atss, ikd, gkd = cfg.MODEL.ATSS, cfg.MODEL.IKD, cfg.MODEL.GKD
        check_choice("MODEL.GKD.LOSS_TYPE", gkd.LOSS_TYPE, ("contrastive", "positive_only"))
        contrastive = gkd.LOSS_TYPE == "contrastive"
        return {
            "backbone": backbone,
            "head": ATSSHead(
                in_channels=shapes[0].channels,
                embed_dim=text.EMBED_DIM,
                num_levels=len(shapes),
                num_convs=atss.NUM_CONVS,
                norm=atss.NORM,
                with_quality=atss.QUALITY != "none",
            ),
            "head_in_features": atss.IN_FEATURES,
            "text_classifier": TextClassifier(
                teacher.encode_captions([text.BACKGROUND_PROMPT])[0],
                logit_scale=text.LOGIT_SCALE,
                logit_scale_range=tuple(text.LOGIT_SCALE_RANGE),
                project_background=text.PROJECT_BACKGROUND,
            ),
            "anchor_generator": build_anchor_generator(cfg, shapes),
            "box2box_transform": Box2BoxTransform(weights=atss.BBOX_REG_WEIGHTS),
            "anchor_matcher": ATSSMatcher(atss.TOPK),
            "teacher": teacher,
            "detection": DetectionSettings(
                quality=atss.QUALITY,
                focal_gamma=atss.FOCAL_GAMMA,
                focal_alpha=atss.FOCAL_ALPHA,
                cls_loss_weight=atss.CLS_LOSS_WEIGHT,
                learn_cls_loss_weight=atss.LEARN_CLS_LOSS_WEIGHT,
                box_reg_loss_weight=atss.BOX_REG_LOSS_WEIGHT,
                quality_loss_weight=atss.QUALITY_LOSS_WEIGHT,
                negative_sampling=atss.NEGATIVE_SAMPLING,
                negative_amount=atss.NEGATIVE_AMOUNT,
                negative_scope=atss.NEGATIVE_SCOPE,
                ignore_padding=atss.IGNORE_PADDING,
            ),
            "inference": InferenceSettings(
                score_thresh=atss.SCORE_THRESH_TEST,
                topk_anchors=atss.TOPK_ANCHORS_TEST,
                topk_pairs=atss.TOPK_PAIRS_TEST,
                nms_thresh=atss.NMS_THRESH_TEST,
                max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
                class_agnostic_nms=atss.CLASS_AGNOSTIC_NMS,
                novel_logit_shift=atss.NOVEL_LOGIT_SHIFT,
            ),
            "ikd": IKD(
                loss_weight=ikd.LOSS_WEIGHT,
                loss_type=ikd.LOSS_TYPE,
                boxes=ikd.BOXES,
                crop_scale=ikd.CROP_SCALE,
                iou_thresh=ikd.IOU_THRESH,
                max_crops_per_image=ikd.MAX_CROPS_PER_IMAGE,
                average_over=ikd.AVERAGE_OVER,
                close_modality_gap=ikd.CLOSE_MODALITY_GAP,
            )
            if ikd.LOSS_WEIGHT > 0
            else None,
            "mlca": MLCA(
                grid_size=gkd.GRID_SIZE,
                pooling=gkd.POOLING,
                logit_scale=gkd.LOGIT_SCALE if contrastive else None,
                logit_scale_range=tuple(gkd.LOGIT_SCALE_RANGE),
            )
            if gkd.LOSS_WEIGHT > 0
            else None,
            "gkd_loss_weight": gkd.LOSS_WEIGHT,
            "gather_captions": gkd.GATHER and contrastive,
            "region_cache": cached if ikd.LOSS_WEIGHT > 0 else None,
            "vocabulary": MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes", [])
            if cfg.DATASETS.TRAIN
            else [],
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "channels_last": cfg.MODEL.CHANNELS_LAST,
            "amp_test": cfg.TEST.AMP.ENABLED,
            "compile_test": cfg.TEST.COMPILE,
        }

    # ------------------------------------------------------------------ vocabulary

    def set_vocabulary(self, names: Sequence[str], text_embeddings: Tensor | None = None) -> None:
        """Choose the classes to classify against.

        Args:
            names: K class names, unique and not empty.
            text_embeddings: (K, D) their embeddings; by default the teacher embeds the names.

        Raises:
            ValueError: if the vocabulary is empty, has a blank or a repeated name or one that is
                no name (:func:`hierkd.teachers.texts.check_names`), or the embeddings do
                not fit.
        """
        check_names(names, "the vocabulary")
        names = tuple(names)
        if text_embeddings is None:
            text_embeddings = self._teacher_or_raise().encode_classes(names)
        if len(text_embeddings) != len(names):
            raise ValueError(f"{len(names)} class names, but {len(text_embeddings)} embeddings")
        self.text_classifier.set_vocabulary(text_embeddings)
        self.vocabulary_names = names

    @contextmanager
    def vocabulary(self, names: Sequence[str]) -> Iterator[None]:
        """Use another vocabulary inside a ``with`` block; the previous one comes back after it."""
        previous = self.vocabulary_names, self.text_classifier.text_embeddings
        self.set_vocabulary(names)
        try:
            yield
        finally:
            self.vocabulary_names, self.text_classifier.text_embeddings = previous

    def are_novel(self, names: Sequence[str]) -> list[bool]:
        """Which class names are not of the training vocabulary, compared as for transfer.

        Raises:
            ValueError: if the training vocabulary is not known.
        """
        if not self.training_vocabulary:
            raise ValueError(
                "MODEL.ATSS.NOVEL_LOGIT_SHIFT needs the class names of the training: DATASETS."
                "TRAIN must name a dataset that is registered here (DATASETS.DEFINITIONS)"
            )
        known = _overlap(tuple(names), self.training_vocabulary).known
        return [name not in known for name in names]

    def novel_logit_shifts(self) -> Tensor | None:
        """(K,) what ``novel_logit_shift`` adds to the logits of the classes.

        None where it changes nothing: it is 0, or base and novel classes do not compete.
        """
        shift = self.inference_settings.novel_logit_shift
        is_novel = self.are_novel(self.vocabulary_names) if shift else []
        if not any(is_novel) or all(is_novel):
            return None
        return shift * self.text_classifier.text_embeddings.new_tensor(is_novel)

    def _teacher_or_raise(self) -> Teacher:
        if self.teacher is None:
            raise RuntimeError("this detector was built without a teacher, and this needs one")
        return self.teacher

    # ------------------------------------------------------------------ training

    def preprocess_image(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """Normalise, pad and batch; detectron2's, in this model's memory order."""
        images = super().preprocess_image(batched_inputs)
        images.tensor = images.tensor.contiguous(memory_format=self.memory_format)
        return images

    def _predict_maps(self, images: ImageList) -> tuple[list[Tensor], PredictedMaps]:
        """The L feature maps of a preprocessed batch and the head's outputs on them.

        In inference under ``TEST.AMP`` and ``TEST.COMPILE``.
        """
        arguments = self.backbone, self.head, self.head_in_features, images.tensor
        if self.training:
            return _maps_of(*arguments)
        with _half_precision(self.device, enabled=self.amp_test):
            if self.compile_test:
                try:
                    maps: tuple[list[Tensor], PredictedMaps] = _compiled(_maps_of)(*arguments)
                    return maps
                except TorchDynamoException as error:
                    self.compile_test = False
                    logger.warning(
                        "TEST.COMPILE: torch.compile does not work here, running without it: %s",
                        str(error).strip().split("\n")[0],
                    )
            return _maps_of(*arguments)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Losses in training, detections in inference; see the class for inputs and outputs."""
        if not self.training:
            return self._detect(batched_inputs)
        check_ground_truth(batched_inputs, self.text_classifier.num_classes)
        self._limit_logit_scales()
        features, pred_maps = self._predict_maps(self.preprocess_image(batched_inputs))
        gt_instances = [x["instances"].to(self.device) for x in batched_inputs]

        with torch.autocast(self.device.type, enabled=False):  # all that follows is float32
            # §3.1: classify and localise the base classes
            predictions = self._flatten(pred_maps)
            anchors = self.anchor_generator(features)
            gt_labels, matched_gt_boxes, matched_idxs = self.label_anchors(anchors, gt_instances)
            positives = self.positive_points(
                predictions, anchors, gt_labels, matched_gt_boxes, matched_idxs
            )
            level_sizes = [len(level) for level in anchors]
            gt_labels = self.sample_negatives(gt_labels, level_sizes)  # §3.4
            # §3.2: what CLIP sees in the regions of the positive points
            region_pairs = self.distill_regions(batched_inputs, predictions, positives, level_sizes)
            # §3.3: how well each image matches each caption
            match_scores = self.match_captions(batched_inputs, pred_maps[0])
            return self.losses(
                predictions, Boxes.cat(anchors), gt_labels, positives, region_pairs, match_scores
            )

    @torch.no_grad()
    def label_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Assign each anchor a class and a box.

        Args:
            anchors: per level; R in all.
            gt_instances: N instances with ``gt_boxes`` and ``gt_classes``.

        Returns:
            gt_labels (N, R): class in [0, K), K = background, -1 = ignored; matched_gt_boxes
            (N, R, 4): of the positives, zero elsewhere; matched_idxs (N, R): their positions among
            the image's M boxes, of the positives.
        """
        background = self.text_classifier.num_classes
        all_labels, all_boxes, all_idxs = [], [], []
        for gt in gt_instances:
            matches, match_labels = self.anchor_matcher(gt.gt_boxes, anchors)
            labels = torch.full_like(matches, background)
            boxes = gt.gt_boxes.tensor.new_zeros(len(matches), 4)
            positive = match_labels == 1
            labels[positive] = gt.gt_classes[matches[positive]]
            boxes[positive] = gt.gt_boxes.tensor[matches[positive]]
            if self.detection.ignore_padding:
                labels[self._in_padding(anchors, gt.image_size)] = -1
            all_labels.append(labels)
            all_boxes.append(boxes)
            all_idxs.append(matches)
        return torch.stack(all_labels), torch.stack(all_boxes), torch.stack(all_idxs)

    def _in_padding(self, anchors: list[Boxes], image_size: tuple[int, int]) -> Tensor:
        """(R,) whether a point belongs to a cell that lies outside the image's own padded size."""
        multiple = max(self.backbone.size_divisibility, 1)
        height, width = (-(-side // multiple) * multiple for side in image_size)
        size = anchors[0].tensor.new_tensor([width, height])
        outside = [
            (level.get_centers() // stride >= (size / stride).ceil()).any(dim=1)
            for level, stride in zip(anchors, self.anchor_generator.strides, strict=True)
        ]
        return torch.cat(outside)

    def sample_negatives(self, gt_labels: Tensor, level_sizes: list[int]) -> Tensor:
        """Ignore most of the negatives (§3.4).

        Args:
            gt_labels: (N, R) labels.
            level_sizes: points of each level, R in all.

        Returns:
            (N, R) labels with -1 for what the classification loss leaves out.
        """
        settings = self.detection
        by_level = settings.negative_scope == "level"
        parts = gt_labels.split(level_sizes, dim=1) if by_level else [gt_labels]
        return torch.cat(
            [
                subsample_negatives(
                    part,
                    self.text_classifier.num_classes,
                    mode=settings.negative_sampling,
                    amount=settings.negative_amount,
                    only_with_positives=by_level,
                )
                for part in parts
            ],
            dim=1,
        )

    def positive_points(
        self,
        predictions: DensePredictions,
        anchors: list[Boxes],
        gt_labels: Tensor,
        matched_gt_boxes: Tensor,
        matched_idxs: Tensor,
    ) -> PositivePoints:
        """Decode the boxes of the positive points and compare them with their objects."""
        is_positive = (gt_labels >= 0) & (gt_labels != self.text_classifier.num_classes)
        image_idxs, point_idxs = is_positive.nonzero(as_tuple=True)
        pred_boxes = self.box2box_transform.apply_deltas(
            predictions.anchor_deltas[image_idxs, point_idxs], Boxes.cat(anchors).tensor[point_idxs]
        )
        gt_boxes = matched_gt_boxes[image_idxs, point_idxs]
        return PositivePoints(
            image_idxs,
            point_idxs,
            pred_boxes,
            gt_boxes,
            matched_idxs[image_idxs, point_idxs],
            box_iou_targets(pred_boxes, gt_boxes),
        )

    def distill_regions(
        self,
        batched_inputs: list[dict[str, Any]],
        predictions: DensePredictions,
        positives: PositivePoints,
        level_sizes: list[int],
    ) -> RegionPairs | None:
        """Pair the embeddings of well-localised positives with CLIP's of their regions (§3.2).

        Returns:
            The pairs, or None if IKD is off.
        """
        if self.ikd is None:
            return None
        points, crops, crop_of_point = choose_crops(self.ikd, positives, len(batched_inputs))
        image_idxs, point_idxs = positives.image_idxs[points], positives.point_idxs[points]
        if self.region_cache is not None:
            teacher = self._look_up_regions(batched_inputs, image_idxs, positives.gt_idxs[points])
        else:
            boxes = positives.pred_boxes if self.ikd.boxes == "predicted" else positives.gt_boxes
            boxes = boxes[crops].detach()
            crop_images = positives.image_idxs[crops]
            teacher = self._teacher_or_raise().encode_regions(
                [x["image"].to(self.device) for x in batched_inputs],
                boxes.split(crop_images.bincount(minlength=len(batched_inputs)).tolist()),
                self.ikd.crop_scale,
            )[crop_of_point]
        if self.ikd.close_modality_gap and len(teacher) > 0:
            text_center = self.text_classifier.text_embeddings.mean(dim=0)
            teacher = F.normalize(teacher - teacher.mean(dim=0) + text_center, dim=1)
        level_ends = torch.tensor(level_sizes, device=point_idxs.device).cumsum(0)
        return RegionPairs(
            student=predictions.embeddings[image_idxs, point_idxs],
            teacher=teacher,
            levels=torch.bucketize(point_idxs, level_ends, right=True),
        )

    def _look_up_regions(
        self, batched_inputs: list[dict[str, Any]], image_idxs: Tensor, gt_idxs: Tensor
    ) -> Tensor:
        """(P, D) cached embeddings of the objects of P points; each object is looked up once."""
        if self.region_cache is None:
            raise RuntimeError("this detector was built without a cache of the teacher")
        instances = [x["instances"] for x in batched_inputs]
        if not all(each.has("gt_annotation_ids") for each in instances):
            raise ValueError(
                "MODEL.TEACHER.CACHE is looked up by annotation, but the batch has no "
                "gt_annotation_ids: the loader needs HierKDDatasetMapper with the same config"
            )
        rows = self.region_cache.encode_annotations(
            [each.gt_annotation_ids for each in instances],
            [x["horizontally_flipped"] for x in batched_inputs],
        ).to(self.device)
        counts = torch.tensor([0, *(len(each) for each in instances[:-1])], device=self.device)
        return rows[counts.cumsum(0)[image_idxs] + gt_idxs]

    def match_captions(
        self, batched_inputs: list[dict[str, Any]], embedding_maps: list[Tensor]
    ) -> Tensor | None:
        """Score every image against every caption of the batch (§3.3).

        How an image looks depends on the caption it is compared with, so with
        ``gather_captions`` the captions go to all processes, each scores its own images against
        all of them, and the rows of scores are joined: N and C are then those of all processes.

        Returns:
            (N, C) match scores, or None if GKD is off.
        """
        if self.mlca is None:
            return None
        captions = self._teacher_or_raise().encode_captions([x["caption"] for x in batched_inputs])
        captions = captions.to(self.device)
        if not self.gather_captions:
            scores: Tensor = self.mlca(embedding_maps, captions)
            return scores
        return gather_rows(self.mlca(embedding_maps, gather_rows(captions)))

    def losses(
        self,
        predictions: DensePredictions,
        anchors: Boxes,
        gt_labels: Tensor,
        positives: PositivePoints,
        region_pairs: RegionPairs | None,
        match_scores: Tensor | None,
    ) -> dict[str, Tensor]:
        """All losses, normalised and weighted (Eq. 6).

        The normalisers are means over the processes, so that the gradients that DDP averages are
        those of one process with the whole batch.
        """
        settings = self.detection
        sampled = gt_labels >= 0
        logits = self.text_classifier(predictions.embeddings[sampled])  # (n, K+1)
        quality_targets = self._quality_targets(anchors, positives)
        regions_per_group = self._count_regions(region_pairs)
        num_positive, quality_sum, *num_regions = (
            _average_over_processes(
                torch.cat(
                    [
                        quality_targets.new_tensor([float(len(quality_targets))]),
                        quality_targets.sum()[None],
                        regions_per_group,
                    ]
                )
            )
            .clamp(min=1.0)
            .unbind()
        )

        loss_cls = (
            softmax_focal_loss(
                logits, gt_labels[sampled], gamma=settings.focal_gamma, alpha=settings.focal_alpha
            )
            / num_positive
        )
        loss_box_reg = (
            weighted_giou_loss(positives.pred_boxes, positives.gt_boxes, quality_targets)
            / quality_sum
        )
        losses = {
            "loss_cls": self._weigh_cls_loss(loss_cls),
            "loss_box_reg": settings.box_reg_loss_weight * loss_box_reg,
        }
        if predictions.qualities is not None:
            pred_quality = predictions.qualities[positives.image_idxs, positives.point_idxs]
            loss_quality = quality_loss(pred_quality, quality_targets) / num_positive
            losses["loss_iou" if settings.quality == "iou" else "loss_centerness"] = (
                settings.quality_loss_weight * loss_quality
            )
        if self.ikd is not None and region_pairs is not None:
            loss_ikd = region_loss(self.ikd.loss_type, region_pairs, num_regions)
            losses["loss_ikd"] = self.ikd.loss_weight * loss_ikd
        if match_scores is not None and self.mlca is not None:
            if self.mlca.logit_scale is None:
                losses["loss_gkd"] = self.gkd_loss_weight * positive_pairs_loss(match_scores)
            else:
                by_image, by_caption = image_caption_contrastive_loss(match_scores)
                losses["loss_gkd_image"] = self.gkd_loss_weight * by_image
                losses["loss_gkd_caption"] = self.gkd_loss_weight * by_caption
        self._record_statistics(len(gt_labels), positives, regions_per_group)
        return losses

    def _count_regions(self, pairs: RegionPairs | None) -> Tensor:
        """Distilled points of each group that the IKD loss is averaged in: one, or L levels."""
        if pairs is None or self.ikd is None:
            return torch.zeros(1, device=self.device)
        if self.ikd.average_over == "points":
            return torch.tensor([float(len(pairs.levels))], device=self.device)
        return pairs.levels.bincount(minlength=len(self.head_in_features)).float()

    def _quality_targets(self, anchors: Boxes, positives: PositivePoints) -> Tensor:
        """(p,) targets of the quality branch, which also weigh the box loss; ones without one."""
        if self.detection.quality == "iou":
            return positives.ious
        if self.detection.quality == "centerness":
            centers = anchors.get_centers()[positives.point_idxs]
            return centerness_targets(centers, positives.gt_boxes)
        return torch.ones_like(positives.ious)

    def _weigh_cls_loss(self, loss: Tensor) -> Tensor:
        if self.cls_loss_log_weight is None:
            return self.detection.cls_loss_weight * loss
        return (-self.cls_loss_log_weight).exp() * loss + self.cls_loss_log_weight.abs()

    def _limit_logit_scales(self) -> None:
        """Keep tau_c and tau_m where they make sense, whatever the last step did to them."""
        self.text_classifier.limit_logit_scale()
        if self.mlca is not None:
            self.mlca.limit_logit_scale()

    @torch.no_grad()
    def _record_statistics(
        self, num_images: int, positives: PositivePoints, regions_per_group: Tensor
    ) -> None:
        """Put what is worth watching into the event storage; docs/monitoring.md explains each."""
        values = {"num_pos_anchors": torch.tensor(len(positives.ious) / num_images)}
        if len(positives.ious) > 0:
            values["iou_pos_anchors"] = positives.ious.mean()
        if self.ikd is not None:
            values["num_distilled_regions"] = regions_per_group.sum() / num_images
            distillable = positives.ious[positives.ious >= self.ikd.iou_thresh]
            if len(distillable) > 0:
                values["iou_distilled_regions"] = distillable.mean()
        if self.cls_loss_log_weight is not None:
            values["cls_weight"] = (-self.cls_loss_log_weight).exp()
        scales = {"tau_c": self.text_classifier, "tau_m": self.mlca}
        for name, part in scales.items():
            if part is not None and part.logit_scale is not None:
                values[name] = part.logit_scale
        # one transfer: each would wait for the device
        numbers = torch.stack([each.to(self.device, torch.float32) for each in values.values()])
        storage = get_event_storage()
        for name, value in zip(values, numbers.tolist(), strict=True):
            storage.put_scalar(name, value)
            part = scales.get(name)
            # in float32, as the parameter holds an end
            if part is not None and value in torch.tensor(part.logit_scale_range).float().tolist():
                log_first_n(
                    logging.WARNING,
                    f"{name} is held at {value:g}, an end of its range {part.logit_scale_range} "
                    "(LOGIT_SCALE_RANGE)",
                    name=__name__,
                    key="message",
                )

    # ------------------------------------------------------------------ inference

    @staticmethod
    def _flatten(
        pred_maps: PredictedMaps,
    ) -> DensePredictions:
        """Lay the L maps of each output end to end as R points."""
        embeddings, deltas, qualities = pred_maps
        return DensePredictions(
            torch.cat([permute_to_N_HWA_K(x, x.shape[1]) for x in embeddings], dim=1),
            torch.cat([permute_to_N_HWA_K(x, 4) for x in deltas], dim=1),
            None
            if qualities is None
            else torch.cat([permute_to_N_HWA_K(x, 1) for x in qualities], dim=1).squeeze(2),
        )

    def _class_probabilities(self, embeddings: Tensor, weight: Tensor | None = None) -> Tensor:
        """(..., D) -> (..., K) probabilities of the classes, the background left out.

        ``weight`` is the text classifier's, where it serves several calls.
        ``novel_logit_shift`` moves the novel logits where base and novel classes compete (GZSD).
        They compete for the probability that there is an object at all, which stays what it was.
        """
        logits: Tensor = self.text_classifier(embeddings, weight)
        probs = logits.softmax(dim=-1)[..., :-1]
        shifts = self.novel_logit_shifts()
        if shifts is not None:
            shifted = logits[..., :-1] + shifts
            probs = probs.sum(dim=-1, keepdim=True) * shifted.softmax(dim=-1)
        return probs

    def _detect(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        """Inference: detectron2's standard output."""
        images = self.preprocess_image(batched_inputs)
        features, predictions = self._predict_maps(images)
        with torch.autocast(self.device.type, enabled=False):  # all that follows is float32
            detections = self.forward_inference(images, features, predictions)
        outputs = []
        for given, found in zip(batched_inputs, detections, strict=True):
            height = given.get("height", found.image_size[0])
            width = given.get("width", found.image_size[1])
            outputs.append({"instances": detector_postprocess(found, height, width)})
        return outputs

    def forward_inference(
        self, images: ImageList, features: list[Tensor], predictions: Any
    ) -> list[Instances]:
        """Detections of each image: best anchors per level, best pairs, class-wise NMS."""
        return [
            self.detect_classes(fore.boxes, fore.classes, fore.qualities, size)
            for fore, size in zip(
                self._select_fore_anchors(images, features, predictions),
                images.image_sizes,
                strict=True,
            )
        ]

    @torch.no_grad()
    def fore_anchors(self, batched_inputs: list[dict[str, Any]]) -> list[ForeAnchors]:
        """Find the anchors of each image that inference ranks, before their classes compete.

        Args:
            batched_inputs: N, as in inference.

        Returns:
            Those of each image. :meth:`detect_classes` makes detections of them.
        """
        images = self.preprocess_image(batched_inputs)
        features, predictions = self._predict_maps(images)
        return self._select_fore_anchors(images, features, predictions)

    def _select_fore_anchors(
        self, images: ImageList, features: list[Tensor], predictions: Any
    ) -> list[ForeAnchors]:
        """Keep the anchors of each image and level whose best class scores highest."""
        anchors = self.anchor_generator(features)
        with torch.autocast(self.device.type, enabled=False):
            flat = self._flatten(predictions)
            return [
                self._select_of_image(flat.at(i), anchors, size)
                for i, size in enumerate(images.image_sizes)
            ]

    def _select_of_image(
        self, predictions: DensePredictions, anchors: list[Boxes], image_size: tuple[int, int]
    ) -> ForeAnchors:
        all_anchors, level_sizes = Boxes.cat(anchors).tensor, [len(level) for level in anchors]
        settings = self.inference_settings
        weight = self.text_classifier.weight()
        classes = ClassProbabilities(
            lambda embeddings: self._class_probabilities(embeddings, weight),
            predictions.embeddings,
            len(weight) - 1,
        )
        qualities = (
            torch.ones_like(classes.best)
            if predictions.qualities is None
            else predictions.qualities.sigmoid()
        )
        anchor_scores = classes.best * qualities
        kept, start = [], 0
        for of_level in anchor_scores.split(level_sizes):
            kept.append(of_level.topk(min(settings.topk_anchors, len(of_level))).indices + start)
            start += len(of_level)
        idxs = torch.cat(kept)
        boxes = Boxes(
            self.box2box_transform.apply_deltas(predictions.anchor_deltas[idxs], all_anchors[idxs])
        )
        boxes.clip(image_size)
        return ForeAnchors(boxes.tensor, classes.select(idxs), qualities[idxs])

    def detect_classes(
        self,
        boxes: Tensor,
        probs: Tensor | ClassProbabilities,
        qualities: Tensor,
        image_size: tuple[int, int],
    ) -> Instances:
        """Make detections of one image's boxes: best (box, class) pairs, then class-wise NMS.

        Args:
            boxes: (A, 4) XYXY, pixels of the network input, inside the image.
            probs: (A, K) class probabilities, the background left out.
            qualities: (A,) factors of the scores, 0..1: the predicted IoU.
            image_size: height and width of the image in the network input, in pixels.

        Returns:
            At most ``TEST.DETECTIONS_PER_IMAGE`` detections, best first, scored by the product.
        """
        settings = self.inference_settings
        pair_scores, rows, classes = best_pairs(
            ClassProbabilities.of(probs) if isinstance(probs, Tensor) else probs,
            qualities,
            limit=settings.topk_pairs,
            score_thresh=settings.score_thresh,
        )
        groups = torch.zeros_like(classes) if settings.class_agnostic_nms else classes
        keep = nms_of_classes(boxes[rows], pair_scores, groups, settings.nms_thresh)
        keep = keep[: settings.max_detections]
        return Instances(
            image_size,
            pred_boxes=Boxes(boxes[rows[keep]]),
            scores=pair_scores[keep],
            pred_classes=classes[keep],
        )

    @torch.no_grad()
    def score_maps(
        self, batched_inputs: list[dict[str, Any]], classes: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Scores of every point, for heat maps in the manner of the paper's Fig. 4.

        Args:
            batched_inputs: as in inference.
            classes: positions in the vocabulary, in the order wanted; None is all K. Whichever they
                are, all names compete.

        Returns:
            L maps (N, K, H_l, W_l), or with as many channels as ``classes``: class probability
            times sigmoid(quality). Point (y, x) of level l lies at pixel ((x + o) s, (y + o) s) of
            the network input, with stride s and the anchor generator's offset o. Padding of the
            batch is included.
        """
        _, (embeddings, _, qualities) = self._predict_maps(self.preprocess_image(batched_inputs))
        weight = self.text_classifier.weight()
        chosen: Any = slice(None) if classes is None else list(classes)
        maps = []
        for level, embedding in enumerate(embeddings):
            points = embedding.permute(0, 2, 3, 1)
            all_probs = ClassProbabilities(
                lambda embeddings: self._class_probabilities(embeddings, weight),
                points.flatten(0, 2),
                len(weight) - 1,
            )
            probs = torch.cat([block[:, chosen] for _, block in all_probs.blocks()])
            probs = probs.view(*points.shape[:3], -1).permute(0, 3, 1, 2)
            maps.append(probs if qualities is None else probs * qualities[level].sigmoid())
        return maps
