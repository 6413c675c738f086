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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from detectron2.config import configurable
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator, build_anchor_generator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from detectron2.utils.logger import log_first_n
from torch import Tensor, nn

from hierkd.modeling.atss import ATSSMatcher
from hierkd.modeling.detector_settings import (
    IKD,
    DetectionSettings,
    InferenceSettings,
    check_choice,
    read_settings,
)
from hierkd.modeling.distillation import (
    PositivePoints,
    Proposals,
    RegionPairs,
    choose_points,
    choose_proposals,
    encode_crops,
    look_up_regions,
    match_proposals,
    region_loss,
)
from hierkd.modeling.head import ATSSHead
from hierkd.modeling.inference import (
    ClassProbabilities,
    DensePredictions,
    ForeAnchors,
    PredictedMaps,
    best_detections,
    blocks_of,
    class_probabilities,
    flatten_maps,
    rank_points,
)
from hierkd.modeling.losses import (
    box_iou_targets,
    centerness_targets,
    image_caption_contrastive_loss,
    positive_pairs_loss,
    quality_loss,
    softmax_focal_loss,
    weighted_giou_loss,
)
from hierkd.modeling.mlca import MLCA, gather_rows
from hierkd.modeling.sampling import subsample_negatives
from hierkd.modeling.text_classifier import LOGIT_SCALE_RANGE, TextClassifier
from hierkd.teachers.clip import build_teacher, check_embed_dim
from hierkd.teachers.protocol import Teacher
from hierkd.teachers.texts import check_names, comparable_name

__all__ = ["DensePredictions", "ForeAnchors", "HierKD"]

# Best points of an image that proposals are chosen among. [ours]
_PROPOSAL_CANDIDATES = 100


@META_ARCH_REGISTRY.register()
class HierKD(DenseDetector):  # type: ignore[misc]  # detectron2 is untyped
    """Open-vocabulary one-stage detector.

    Training reads the dataset dicts of :class:`hierkd.data.mapper.HierKDDatasetMapper`:
    ``image`` (3, H, W) raw, ``instances`` with ``gt_boxes`` and ``gt_classes`` (base classes only),
    and ``caption`` (str) when GKD is on. What the teacher says of them may come along, as
    ``gt_region_embeddings`` (M, D) of the instances, ``caption_embedding`` (D,), and ``proposals``,
    which take the place of the detector's own. It returns true losses only, already weighted.
    Inference returns detectron2's standard output; ``pred_classes`` index :attr:`vocabulary_names`.

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
    ) -> None:
        """Assemble the detector from its parts.

        Args:
            backbone, head, text_classifier, anchor_generator, box2box_transform, anchor_matcher:
                the parts of §3.1; one square anchor per point.
            head_in_features: names of the backbone's maps, finest first.
            teacher: CLIP behind the ``Teacher`` protocol; None if neither distillation nor a new
                vocabulary by name is wanted.
            detection, inference: numbers of the §3.1 losses, and of inference.
            ikd, mlca: instance-level distillation, and the matcher of global-level; None = off.
            gkd_loss_weight: lambda_Glo.
            vocabulary: class names of the training set, in contiguous-id order; may be empty, then
                :meth:`set_vocabulary` comes before the first batch.
            pixel_mean, pixel_std: per channel, in the order of the input image.
            channels_last: keep maps in channels-last memory order.
            amp_test, compile_test: run backbone and head in half precision, or through
                ``torch.compile``, in inference.
            gather_captions: contrast images and captions over all processes.
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
        teacher = build_teacher(cfg)
        text, atss, gkd = cfg.MODEL.TEXT_CLASSIFIER, cfg.MODEL.ATSS, cfg.MODEL.GKD
        check_embed_dim(teacher, text.EMBED_DIM)
        check_choice("MODEL.GKD.LOSS_TYPE", gkd.LOSS_TYPE, ("contrastive", "positive_only"))
        contrastive = gkd.LOSS_TYPE == "contrastive"
        trained_on = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]) if cfg.DATASETS.TRAIN else None
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
                project_background=text.PROJECT_BACKGROUND,
            ),
            "anchor_generator": build_anchor_generator(cfg, shapes),
            "box2box_transform": Box2BoxTransform(weights=atss.BBOX_REG_WEIGHTS),
            "anchor_matcher": ATSSMatcher(atss.TOPK),
            "teacher": teacher,
            "detection": read_settings(DetectionSettings, atss),
            "inference": InferenceSettings(
                score_thresh=atss.SCORE_THRESH_TEST,
                topk_anchors=atss.TOPK_ANCHORS_TEST,
                topk_pairs=atss.TOPK_PAIRS_TEST,
                nms_thresh=atss.NMS_THRESH_TEST,
                max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
                novel_logit_shift=atss.NOVEL_LOGIT_SHIFT,
                teacher_boxes=cfg.TEST.TEACHER.BOXES,
                teacher_exponents=tuple(cfg.TEST.TEACHER.EXPONENTS),
                teacher_crop_scale=cfg.MODEL.IKD.CROP_SCALE,
            ),
            "ikd": read_settings(IKD, cfg.MODEL.IKD) if cfg.MODEL.IKD.LOSS_WEIGHT > 0 else None,
            "mlca": MLCA(
                grid_size=gkd.GRID_SIZE,
                pooling=gkd.POOLING,
                logit_scale=gkd.LOGIT_SCALE if contrastive else None,
            )
            if gkd.LOSS_WEIGHT > 0
            else None,
            "gkd_loss_weight": gkd.LOSS_WEIGHT,
            "gather_captions": gkd.GATHER and contrastive,
            "vocabulary": () if trained_on is None else trained_on.get("thing_classes", ()),
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
    def vocabulary(
        self, names: Sequence[str], text_embeddings: Tensor | None = None
    ) -> Iterator[None]:
        """Use another vocabulary inside a ``with`` block; the previous one comes back after it."""
        previous = self.vocabulary_names, self.text_classifier.text_embeddings
        self.set_vocabulary(names, text_embeddings)
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
                "MODEL.ATSS.NOVEL_LOGIT_SHIFT and TEST.TEACHER.EXPONENTS need the class names of "
                "the training: DATASETS.TRAIN must name a dataset that is registered here "
                "(DATASETS.DEFINITIONS)"
            )
        known = {comparable_name(name) for name in self.training_vocabulary}
        return [comparable_name(name) not in known for name in names]

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

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Losses in training, detections in inference; see the class for inputs and outputs."""
        if not self.training:
            return self._detect(batched_inputs)
        batched_inputs = [
            {**x, "image": x["image"].to(self.device, non_blocking=True)} for x in batched_inputs
        ]
        self.text_classifier.limit_logit_scale()
        if self.mlca is not None:
            self.mlca.limit_logit_scale()
        features, pred_maps = self._predict_maps(self.preprocess_image(batched_inputs))
        gt_instances = [x["instances"].to(self.device) for x in batched_inputs]

        with torch.autocast(self.device.type, enabled=False):  # all that follows is float32
            # §3.1: classify and localise the base classes
            predictions = flatten_maps(pred_maps)
            anchors = self.anchor_generator(features)
            gt_labels, matched_gt_boxes, matched_idxs = self.label_anchors(anchors, gt_instances)
            positives = self.positive_points(
                predictions, anchors, gt_labels, matched_gt_boxes, matched_idxs
            )
            level_sizes = [len(level) for level in anchors]
            gt_labels = self.sample_negatives(gt_labels, level_sizes)  # §3.4
            # §3.2: what CLIP sees in the regions of the positive points, and of proposals
            captions = self.caption_embeddings(batched_inputs)
            proposals = self.propose_regions(
                batched_inputs, predictions, anchors, positives, gt_instances
            )
            region_pairs = self.distill_regions(
                batched_inputs, predictions, positives, proposals, level_sizes, captions
            )
            # §3.3: how well each image matches each caption
            match_scores = self.match_captions(pred_maps[0], captions)
            return self.losses(
                predictions, Boxes.cat(anchors), gt_labels, positives, region_pairs, match_scores
            )

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
        on_cpu = self.device.type == "cpu"
        has_bfloat16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
        if self.amp_test and on_cpu and not has_bfloat16():
            log_first_n(
                logging.WARNING,
                "TEST.AMP: this processor has no units for bfloat16, so that a picture takes "
                "several times as long as in float32",
                name=__name__,
                key="message",
            )
        # the half precision that is fast there; without it, what somebody else's autocast says
        half = torch.bfloat16 if on_cpu else torch.float16
        with torch.autocast(self.device.type, half) if self.amp_test else nullcontext():
            return (_compiled_maps_of() if self.compile_test else _maps_of)(*arguments)

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
        background, assigned = self.text_classifier.num_classes, []
        for gt in gt_instances:
            matches, match_labels = self.anchor_matcher(gt.gt_boxes, anchors)
            labels = torch.full_like(matches, background)
            boxes = gt.gt_boxes.tensor.new_zeros(len(matches), 4)
            if len(gt) > 0:  # by `where`, for which a GPU does not wait
                positive = match_labels == 1
                labels = torch.where(positive, gt.gt_classes[matches], labels)
                boxes = torch.where(positive[:, None], gt.gt_boxes.tensor[matches], boxes)
            if self.detection.ignore_padding:
                labels = labels.masked_fill(self._in_padding(anchors, gt.image_size), -1)
            assigned.append((labels, boxes, matches))
        gt_labels, gt_boxes, gt_idxs = (torch.stack(each) for each in zip(*assigned, strict=True))
        return gt_labels, gt_boxes, gt_idxs

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
        pools = gt_labels.split(level_sizes, dim=1) if by_level else [gt_labels]
        sampled = [
            subsample_negatives(
                pool,
                self.text_classifier.num_classes,
                mode=settings.negative_sampling,
                amount=settings.negative_amount,
                only_with_positives=by_level,
            )
            for pool in pools
        ]
        return torch.cat(sampled, dim=1)

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
        places = image_idxs, point_idxs = is_positive.nonzero(as_tuple=True)
        pred_boxes = self.box2box_transform.apply_deltas(
            predictions.anchor_deltas[places], Boxes.cat(anchors).tensor[point_idxs]
        )
        gt_boxes = matched_gt_boxes[places]
        ious = box_iou_targets(pred_boxes, gt_boxes)
        return PositivePoints(
            image_idxs, point_idxs, pred_boxes, gt_boxes, matched_idxs[places], ious
        )

    @torch.no_grad()
    def propose_regions(
        self,
        batched_inputs: list[dict[str, Any]],
        predictions: DensePredictions,
        anchors: list[Boxes],
        positives: PositivePoints,
        gt_instances: list[Instances],
    ) -> Proposals | None:
        """Find boxes that the detector takes for objects and that nobody has labelled.

        Such boxes may have come with the batch; then their points are found.

        How much a point is taken for an object of any kind, 1 - p(background) times the predicted
        quality, knows no names, so that novel objects are among the best.

        Returns:
            Proposals of all images; None where they are off, or not on yet.
        """
        if self.ikd is None or self.ikd.proposals_per_image == 0:
            return None
        if get_event_storage().iter < self.ikd.proposals_start:
            return None
        if all("proposals" in x for x in batched_inputs):
            given = [x["proposals"].to(self.device) for x in batched_inputs]
            return match_proposals(given, anchors, self.anchor_matcher, positives)
        scores = 1 - self.text_classifier(predictions.embeddings).softmax(dim=-1)[..., -1]
        if predictions.qualities is not None:
            scores = scores * predictions.qualities.sigmoid()
        top, point_idxs = scores.topk(min(_PROPOSAL_CANDIDATES, scores.shape[1]), dim=1)  # (N, A)
        image_idxs = torch.arange(len(top), device=top.device).repeat_interleave(top.shape[1])
        point_idxs = point_idxs.flatten()
        boxes = self.box2box_transform.apply_deltas(
            predictions.anchor_deltas[image_idxs, point_idxs],
            Boxes.cat(anchors).tensor[point_idxs],
        )
        sizes = boxes.new_tensor([each.image_size[::-1] for each in gt_instances]).repeat(1, 2)
        boxes = torch.minimum(boxes.clamp(min=0), sizes[image_idxs])
        candidates = Proposals(image_idxs, point_idxs, boxes)
        return choose_proposals(
            candidates, top.flatten(), gt_instances, self.ikd.proposals_per_image
        )

    def distill_regions(
        self,
        batched_inputs: list[dict[str, Any]],
        predictions: DensePredictions,
        positives: PositivePoints,
        proposals: Proposals | None,
        level_sizes: list[int],
        captions: Tensor | None,
    ) -> RegionPairs | None:
        """Pair the embeddings of well-localised positives with CLIP's of their regions (§3.2).

        Proposals follow the positives. CLIP looks at the regions, unless what it sees in the
        objects came with the batch.

        Returns:
            The pairs, or None if IKD is off.
        """
        if self.ikd is None:
            return None
        points = choose_points(self.ikd, positives, len(batched_inputs))
        teacher = look_up_regions([x["instances"] for x in batched_inputs], points)
        if teacher is None:
            images = [x["image"] for x in batched_inputs]
            teacher = encode_crops(self._teacher_or_raise(), self.ikd, images, points, proposals)
        elif proposals is not None and proposals.embeddings is not None:
            teacher = torch.cat([teacher, proposals.embeddings])
        image_idxs, point_idxs = points.image_idxs, points.point_idxs
        if proposals is not None:
            image_idxs = torch.cat([image_idxs, proposals.image_idxs])
            point_idxs = torch.cat([point_idxs, proposals.point_idxs])
        texts, scale = None, 1.0
        if self.ikd.loss_type == "kl":
            names = self.text_classifier.text_embeddings
            texts = names if captions is None else torch.cat([names, captions])
            scale = self._teacher_or_raise().logit_scale
        level_ends = torch.tensor(level_sizes, device=teacher.device).cumsum(0)
        return RegionPairs(
            student=predictions.embeddings[image_idxs, point_idxs],
            teacher=teacher,
            levels=torch.bucketize(point_idxs, level_ends, right=True),
            texts=texts,
            scale=scale,
        )

    def caption_embeddings(self, batched_inputs: list[dict[str, Any]]) -> Tensor | None:
        """(N, D) the teacher's embeddings of the images' captions; None if GKD is off."""
        if self.mlca is None:
            return None
        if all("caption_embedding" in x for x in batched_inputs):
            captions = torch.stack([x["caption_embedding"] for x in batched_inputs])
        else:
            teacher = self._teacher_or_raise()
            captions = teacher.encode_captions([x["caption"] for x in batched_inputs])
        return captions.to(self.device)

    def match_captions(
        self, embedding_maps: list[Tensor], captions: Tensor | None
    ) -> Tensor | None:
        """Score every image against every caption of the batch (§3.3).

        How an image looks depends on the caption it is compared with, so with
        ``gather_captions`` the captions go to all processes, each scores its own images against
        all of them, and the rows of scores are joined: N and C are then those of all processes.

        Returns:
            (N, C) match scores, or None if GKD is off.
        """
        if self.mlca is None or captions is None:
            return None
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
        settings, sampled = self.detection, (gt_labels >= 0).nonzero(as_tuple=True)
        logits = self.text_classifier(predictions.embeddings[sampled])  # (n, K+1)
        quality_targets = self._quality_targets(anchors, positives)
        regions_per_group = self._count_regions(region_pairs)
        number = quality_targets.new_tensor([float(len(quality_targets))])
        num_positive, quality_sum, *num_regions = _average_over_processes(
            torch.cat([number, quality_targets.sum()[None], regions_per_group])
        ).unbind()
        loss_cls = softmax_focal_loss(
            logits, gt_labels[sampled], gamma=settings.focal_gamma, alpha=settings.focal_alpha
        )
        loss_box_reg = weighted_giou_loss(positives.pred_boxes, positives.gt_boxes, quality_targets)
        losses = {
            "loss_cls": self._weigh_cls_loss(loss_cls / num_positive),
            "loss_box_reg": settings.box_reg_loss_weight * (loss_box_reg / quality_sum),
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
            if name in scales and value in LOGIT_SCALE_RANGE:
                log_first_n(
                    logging.WARNING,
                    f"{name} is held at {value:g}, an end of its range {LOGIT_SCALE_RANGE}",
                    name=__name__,
                    key="message",
                )

    # ------------------------------------------------------------------ inference

    @torch.no_grad()
    def _detect(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        """Inference: detectron2's standard output."""
        outputs = []
        fores = self.fore_anchors(batched_inputs)
        if self.inference_settings.teacher_boxes > 0:
            fores = self.ask_teacher(batched_inputs, fores)
        for given, fore in zip(batched_inputs, fores, strict=True):
            size = (given["image"].shape[1], given["image"].shape[2])
            found = _as_instances(size, *best_detections(*fore, self.inference_settings))
            height, width = given.get("height", size[0]), given.get("width", size[1])
            outputs.append({"instances": detector_postprocess(found, height, width)})
        return outputs

    @torch.no_grad()
    def fore_anchors(self, batched_inputs: list[dict[str, Any]]) -> list[ForeAnchors]:
        """Find the anchors of each image that inference ranks, before their classes compete.

        Args:
            batched_inputs: N, as in inference.

        Returns:
            Those of each image. :meth:`detect_classes` makes detections of them.
        """
        images = self.preprocess_image(batched_inputs)
        features, maps = self._predict_maps(images)
        anchors = [level.tensor for level in self.anchor_generator(features)]
        predictions, classify = flatten_maps(maps), self._classify()
        return [
            rank_points(
                predictions.of_image(i),
                ClassProbabilities.of_embeddings(
                    classify, predictions.embeddings[i], self.text_classifier.num_classes
                ),
                anchors,
                self.box2box_transform,
                size,
                self.inference_settings.topk_anchors,
            )
            for i, size in enumerate(images.image_sizes)
        ]

    @torch.no_grad()
    def ask_teacher(
        self, batched_inputs: list[dict[str, Any]], fores: Sequence[ForeAnchors]
    ) -> list[ForeAnchors]:
        """Join the class probabilities of each image's best boxes with the teacher's own.

        Where there is an object, the probability of each class becomes a geometric mean of the two,
        as in ViLD and F-VLM; whether there is one stays the detector's to say. Other boxes go.

        Args:
            batched_inputs: N, as in inference.
            fores: of each image.

        Returns:
            At most ``TEST.TEACHER.BOXES`` of each image.
        """
        settings, teacher = self.inference_settings, self._teacher_or_raise()
        texts = self.text_classifier.text_embeddings
        of_base, of_novel = settings.teacher_exponents
        exponents = texts.new_full((len(texts),), of_base)  # (K,)
        if of_novel != of_base:
            is_novel = self.are_novel(self.vocabulary_names)
            exponents[torch.tensor(is_novel, device=texts.device)] = of_novel
        fores = [fore.best(settings.teacher_boxes) for fore in fores]
        boxes = [fore.boxes for fore in fores]
        embeddings = self.embed_boxes(batched_inputs, boxes, settings.teacher_crop_scale)
        joined = []
        for fore, seen in zip(fores, embeddings, strict=True):
            own = fore.probs  # (A, K)
            is_object = own.sum(dim=1, keepdim=True)
            looks = (teacher.logit_scale * seen @ texts.T).softmax(dim=1)
            probs = is_object * (own / is_object) ** (1 - exponents) * looks**exponents
            joined.append(fore._replace(classes=ClassProbabilities.of(probs)))
        return joined

    @torch.no_grad()
    def embed_boxes(
        self, batched_inputs: Sequence[Mapping[str, Any]], boxes: Sequence[Tensor], scale: float
    ) -> list[Tensor]:
        """What the teacher sees in boxes (A, 4) of each image, in one call: N tensors (A, D)."""
        images = [x["image"] for x in batched_inputs]
        regions = self._teacher_or_raise().encode_regions(images, boxes, scale)
        return list(regions.to(self.device).split([len(each) for each in boxes]))

    def _classify(self) -> Callable[[Tensor], Tensor]:
        """A function of (n, D) embeddings: the (n, K) probabilities of the vocabulary's classes."""
        weight, shift = self.text_classifier.weight(), self.novel_logit_shifts()

        def classify(embeddings: Tensor) -> Tensor:
            with torch.autocast(self.device.type, enabled=False):  # as all that follows: float32
                return class_probabilities(self.text_classifier(embeddings, weight), shift)

        return classify

    @torch.no_grad()
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
        classes = ClassProbabilities.of(probs) if isinstance(probs, Tensor) else probs
        found = best_detections(boxes, classes, qualities, self.inference_settings)
        return _as_instances(image_size, *found)

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
        classify, chosen = self._classify(), slice(None) if classes is None else list(classes)
        maps = []
        for level, embedding in enumerate(embeddings):
            points = embedding.permute(0, 2, 3, 1)
            blocks = blocks_of(points.flatten(0, 2), self.text_classifier.num_classes)
            probs = torch.cat([classify(block)[:, chosen] for block in blocks])
            probs = probs.view(*points.shape[:3], -1).permute(0, 3, 1, 2)
            maps.append(probs if qualities is None else probs * qualities[level].sigmoid())
        return maps


def _as_instances(
    image_size: tuple[int, int], boxes: Tensor, scores: Tensor, classes: Tensor
) -> Instances:
    return Instances(image_size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)


def _average_over_processes(values: Tensor) -> Tensor:
    """Mean over the processes of a vector of normalisers, whose sums count as 1 at least.

    DDP averages gradients, so that the result is that of one process with the whole batch.
    """
    world_size = comm.get_world_size()
    if world_size > 1:
        torch.distributed.all_reduce(values)
    return values.clamp(min=1.0).div_(world_size)


def _maps_of(
    backbone: nn.Module, head: nn.Module, head_in_features: list[str], images: Tensor
) -> tuple[list[Tensor], PredictedMaps]:
    """The L feature maps of (N, 3, H, W) images and the head's outputs on them."""
    by_name = backbone(images)
    features = [by_name[f] for f in head_in_features]
    return features, head(features)


@cache
def _compiled_maps_of() -> Callable[..., tuple[list[Tensor], PredictedMaps]]:
    """Compiled for the first size of images by itself, then for any."""
    return torch.compile(_maps_of)
