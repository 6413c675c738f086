"""The keys HierKD adds to detectron2's config.

Each key says its meaning, its unit and where its default comes from: ``[paper §x]``, ``[Table x]``,
``[ATSS]``, ``[release]`` (the authors' code, where the paper is silent), ``[detectron2]``,
``[ours]``.
"""

from __future__ import annotations

from detectron2.config import CfgNode as CN  # noqa: N817 (detectron2's own abbreviation)

__all__ = ["add_hierkd_config"]


_REMOVED = (
    "MODEL.ATSS.CLASS_AGNOSTIC_NMS",
    "MODEL.ATSS.PRESELECT_ABOVE",
    "MODEL.GKD.LOGIT_SCALE_RANGE",
    "MODEL.TEXT_CLASSIFIER.LOGIT_SCALE_RANGE",
    "MODEL.ATSS.PRESELECT_POINTS_TEST",
    "MODEL.IKD.CLOSE_MODALITY_GAP",
    "MODEL.IKD.MERGE_CROPS_IOU",
)


def add_hierkd_config(cfg: CN) -> None:
    """Add HierKD's keys, with the paper's values, to a config made by ``get_cfg()``.

    Args:
        cfg: the config to extend in place.
    """
    _add_detector_keys(cfg)
    _add_text_classifier_keys(cfg)
    _add_distillation_keys(cfg)
    _add_miniature_and_training_keys(cfg)
    for key in _REMOVED:  # a run of before can still be used: yacs warns and passes them over
        cfg.register_deprecated_key(key)


def _add_detector_keys(cfg: CN) -> None:
    """§3.1: the detector."""
    cfg.MODEL.ATSS = CN()
    # Feature maps the head looks at, finest first. [ATSS; five FPN levels: paper §3.3]
    cfg.MODEL.ATSS.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # 3x3 convolutions in each of the two towers. [ATSS]
    cfg.MODEL.ATSS.NUM_CONVS = 4
    # Norm of the towers, a detectron2 norm name; "GN" has 32 groups. [ATSS]
    cfg.MODEL.ATSS.NORM = "GN"
    # Candidates per level and box of the assigner. [ATSS]
    cfg.MODEL.ATSS.TOPK = 9
    # Weights of (dx, dy, dw, dh) in the box transform. [ATSS]
    cfg.MODEL.ATSS.BBOX_REG_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
    # What the quality branch predicts: "iou" [paper §3.1], "centerness" (the paper's baseline,
    # Table 4) or "none" (no branch: score = class probability).
    cfg.MODEL.ATSS.QUALITY = "iou"
    # Focal loss: focusing exponent and the constant factor on all points. [release]
    cfg.MODEL.ATSS.FOCAL_GAMMA = 2.0
    cfg.MODEL.ATSS.FOCAL_ALPHA = 0.25
    # Weight of the classification loss. If LEARN_CLS_LOSS_WEIGHT, the start of a learned w with
    # loss exp(-w) * L + |w|; otherwise a constant factor. [release: learned, from 1]
    cfg.MODEL.ATSS.CLS_LOSS_WEIGHT = 1.0
    cfg.MODEL.ATSS.LEARN_CLS_LOSS_WEIGHT = True
    # Weights of the GIoU loss and of the quality branch's loss. [release]
    cfg.MODEL.ATSS.BOX_REG_LOSS_WEIGHT = 2.0
    cfg.MODEL.ATSS.QUALITY_LOSS_WEIGHT = 1.0
    # Negatives of the classification loss: "fraction" keeps NEGATIVE_AMOUNT of all negatives of the
    # batch, drawn anew each step; "per_positive" keeps NEGATIVE_AMOUNT per positive.
    # [paper §3.4, Table 5: 10 %]
    cfg.MODEL.ATSS.NEGATIVE_SAMPLING = "fraction"
    cfg.MODEL.ATSS.NEGATIVE_AMOUNT = 0.1
    # Where they are drawn: "batch" = from all levels together [ours: the paper does not say], or
    # "level" = from each level by itself, and none from a level without a positive [release].
    cfg.MODEL.ATSS.NEGATIVE_SCOPE = "batch"
    # Whether points outside an image's own size, padded to a multiple of the backbone's stride, are
    # left out of the losses. False: where a batch pads the image further, they are negatives like
    # any others, as in detectron2's detectors. [release: True]
    cfg.MODEL.ATSS.IGNORE_PADDING = False
    # Inference: class probabilities at or below the threshold are dropped (before the product with
    # the IoU); then the best anchors of each level, then the best (anchor, class) pairs of the
    # image go to NMS (0 = all pairs). [paper §4.2: 0.0; release: 1000; pairs: ours, the release
    # sends all]
    cfg.MODEL.ATSS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.ATSS.TOPK_ANCHORS_TEST = 1000
    cfg.MODEL.ATSS.TOPK_PAIRS_TEST = 3000
    # IoU of class-wise NMS. [paper §4.2]
    cfg.MODEL.ATSS.NMS_THRESH_TEST = 0.4
    # Calibration of generalised inference: added to the logits of the classes that are not in the
    # training vocabulary, wherever the vocabulary holds both kinds; 0 = off. In units of logits:
    # the odds of novel against base classes are multiplied by its exponential, the probability of
    # an object of any class stays. [ours, after the calibrated stacking of Chao et al., ECCV 2016]
    cfg.MODEL.ATSS.NOVEL_LOGIT_SHIFT = 0.0


def _add_text_classifier_keys(cfg: CN) -> None:
    """Eq. 1: what embeddings are compared with."""
    cfg.MODEL.TEXT_CLASSIFIER = CN()
    # D, width of the CLIP space the detector learns; 512 for ViT-B/32. Must equal the teacher's.
    cfg.MODEL.TEXT_CLASSIFIER.EMBED_DIM = 512
    # Start of tau_c, which multiplies the cosines. [paper §4.2]
    cfg.MODEL.TEXT_CLASSIFIER.LOGIT_SCALE = 100.0
    # Prompt of a class; {} is the name. [paper §3]
    cfg.MODEL.TEXT_CLASSIFIER.TEMPLATE = "a photo of a {}."
    # Prompt ensemble: several templates in place of TEMPLATE; a class is the normalised mean of
    # their normalised embeddings, as in CLIP. Empty = TEMPLATE alone. [ours]
    cfg.MODEL.TEXT_CLASSIFIER.TEMPLATES = ()
    # The same from a text file: one template a line, "#" begins a comment; e.g.
    # datasets/prompts/ensemble.txt. Reading the config puts them into TEMPLATES, so that what a run
    # writes down does not depend on the file. "" = none. [ours]
    cfg.MODEL.TEXT_CLASSIFIER.TEMPLATES_FILE = ""
    # Class embeddings made beforehand: path of a file of datasets/extract_text_embeddings.py,
    # for running without CLIP's weights. "" = the teacher encodes the names. [ours]
    cfg.MODEL.TEXT_CLASSIFIER.EMBEDDINGS = ""
    # Text whose embedding the learned background starts from. [paper §3.1]
    cfg.MODEL.TEXT_CLASSIFIER.BACKGROUND_PROMPT = "a photo of background."
    # How the background embedding keeps unit length: False = it is normalised in use [ours], True =
    # the parameter itself is set back to unit length before each training step [release].
    cfg.MODEL.TEXT_CLASSIFIER.PROJECT_BACKGROUND = False


def _add_distillation_keys(cfg: CN) -> None:
    """§3.2, §3.3: the two distillations and their teacher."""
    cfg.MODEL.IKD = CN()
    # lambda_ins; 0 turns instance-level distillation off. [paper Eq. 6; value ours, see Table 2]
    cfg.MODEL.IKD.LOSS_WEIGHT = 1.0
    # "l1" [paper Eq. 2], "l2" (Table 2; the norm is not squared), or "kl": the embeddings are to be
    # as similar as CLIP's to the class names and captions of the batch, and to what CLIP sees in
    # its other regions. [ours; docs/lab/miniature.md]
    cfg.MODEL.IKD.LOSS_TYPE = "l1"
    # Which boxes the teacher looks at: "predicted" [paper §3.2] or "gt" (Table 2).
    cfg.MODEL.IKD.BOXES = "predicted"
    # Side of the crop over side of the box. [Table 2: 1.5 better than 1.0]
    cfg.MODEL.IKD.CROP_SCALE = 1.5
    # A positive is distilled if its predicted box has at least this IoU with its object.
    # [paper §3.2: "a fixed IOU threshold"; its value: release]
    cfg.MODEL.IKD.IOU_THRESH = 0.5
    # At most this many crops per image on average, drawn at random over the batch; 0 = no limit.
    # With BOXES "gt" it is a limit of points, several of which share a crop, so that a training
    # does the same with and without MODEL.TEACHER.CACHE. [ours: bounds the cost of the teacher]
    cfg.MODEL.IKD.MAX_CROPS_PER_IMAGE = 0
    # What the loss is a mean of: "points" = all distilled points [paper Eq. 2], or "levels" = the
    # means of the levels, each with the same weight [release].
    cfg.MODEL.IKD.AVERAGE_OVER = "points"
    # Distil so many of the best boxes of each image that overlap no labelled box, too. What ranks
    # them knows no names: 1 - p(background), times the predicted IoU. They come on top of
    # MAX_CROPS_PER_IMAGE. With MODEL.TEACHER.CACHE they are those of the cache, each with all its
    # points. 0 = none [paper]. [ours; docs/lab/miniature.md]
    cfg.MODEL.IKD.PROPOSALS_PER_IMAGE = 0
    # Iteration from which on they are: the boxes of an untrained detector show nothing. [ours]
    cfg.MODEL.IKD.PROPOSALS_START = 0

    cfg.MODEL.GKD = CN()
    # lambda_Glo; 0 turns global-level distillation off. [release]
    cfg.MODEL.GKD.LOSS_WEIGHT = 1.0
    # "contrastive" [paper Eq. 5] or "positive_only" (Table 3, "PL").
    cfg.MODEL.GKD.LOSS_TYPE = "contrastive"
    # G, the patch grid per level is G x G. [paper §4.2, Table 3]
    cfg.MODEL.GKD.GRID_SIZE = 3
    # "max" [Table 3] or "avg".
    cfg.MODEL.GKD.POOLING = "max"
    # Start of tau_m, which multiplies the match scores. [paper §4.2]
    cfg.MODEL.GKD.LOGIT_SCALE = 10.0
    # Contrast the images of every process with the captions of every process, instead of each
    # process its own; loss and gradients are then those of one process with the whole batch. For
    # "contrastive": "positive_only" compares nothing across pairs and ignores it. [ours; the paper
    # and the release contrast 8 pairs per GPU, and the paper guesses that this is too few]
    cfg.MODEL.GKD.GATHER = False

    cfg.MODEL.TEACHER = CN()
    # OpenAI's CLIP: a name ("ViT-B/32", "RN50", ...) that is downloaded once, or the path of a file
    # in OpenAI's format (TorchScript archive or state dict). [paper §4.2]
    # Any other CLIP, with the package open_clip: "open_clip:MODEL:TAG", downloaded once
    # ("open_clip:ViT-B-16:laion2b_s34b_b88k"), "open_clip:MODEL:FILE" or "open_clip:FOLDER" with
    # open_clip_config.json and weights. TEXT_CLASSIFIER.EMBED_DIM goes with it; docs/teachers.md
    # has the sizes. [ours]
    cfg.MODEL.TEACHER.WEIGHTS = "ViT-B/32"
    # Mean and deviation of the pixels that the teacher sees: "clip", its own [ours: the paper does
    # not say], or "imagenet" [release].
    cfg.MODEL.TEACHER.PIXEL_STATISTICS = "clip"
    # Folder of downloaded weights; "" = ~/.cache/clip for OpenAI's CLIP, the model hub's cache
    # (HF_HOME) for open_clip's.
    cfg.MODEL.TEACHER.DOWNLOAD_ROOT = ""
    # Folder of the text embedding cache; "" = $HIERKD_CACHE or ~/.cache/hierkd/text_embeddings.
    cfg.MODEL.TEACHER.TEXT_CACHE_DIR = ""
    # Folder that tools/cache_teacher.py has filled with the embeddings of all training boxes and
    # captions: training with MODEL.IKD.BOXES "gt" then does without CLIP. "" = none. [ours, after
    # Table 2: ground-truth boxes distil as well as predicted ones]
    cfg.MODEL.TEACHER.CACHE = ""


def _add_miniature_and_training_keys(cfg: CN) -> None:
    """What the miniature and the training recipe need beyond detectron2's own keys."""
    # The narrow ResNet of the miniature: channels and basic blocks of res2..res5. [ours]
    cfg.MODEL.SLIM_RESNET = CN()
    cfg.MODEL.SLIM_RESNET.WIDTHS = [32, 64, 128, 160]
    cfg.MODEL.SLIM_RESNET.BLOCKS = [1, 1, 1, 1]
    # Keep feature maps in channels-last memory order: the same numbers, faster on a CPU and with
    # AMP on recent GPUs. [ours]
    cfg.MODEL.CHANNELS_LAST = False

    # Inference with backbone and head in half precision: float16 on a GPU, bfloat16 on a CPU, where
    # it pays on processors with AVX512-BF16 or AMX. What follows them, from the normalised
    # embeddings to NMS, stays float32. [ours; named after detectron2's SOLVER.AMP]
    cfg.TEST.AMP = CN()
    cfg.TEST.AMP.ENABLED = False
    # Inference with backbone and head compiled by torch.compile, which takes a minute at the first
    # image and at the first of another size. Needs a C++ compiler on a CPU, Triton on a GPU. [ours]
    cfg.TEST.COMPILE = False

    # Inference in which the teacher looks at so many best boxes of each picture, too, in crops of
    # MODEL.IKD.CROP_SCALE; 0 = it does not [paper]. Where there is an object, the probability of a
    # class is p(detector)^(1 - e) p(teacher)^e, with one e for base and one for novel names. [ours,
    # after ViLD and F-VLM, whose exponents these are; docs/lab/miniature.md]
    cfg.TEST.TEACHER = CN()
    cfg.TEST.TEACHER.BOXES = 0
    cfg.TEST.TEACHER.EXPONENTS = (0.35, 0.65)

    # "SGD" [release] or "ADAMW" (the miniature).
    cfg.SOLVER.OPTIMIZER = "SGD"
    # CLIP_GRADIENTS.CLIP_TYPE "full_model" clips the norm of all gradients together, as the release
    # does; detectron2's own types clip each parameter by itself.

    # detectron2's ASPECT_RATIO_GROUPING is not read: batches are of any shapes, in the order that
    # the seed gives. [ours]

    # What to do with a training image that cannot be decoded: stop (False) or skip it and say so.
    cfg.DATALOADER.SKIP_BROKEN_IMAGES = False
    # Decode every training and test image once before the first step, so that a broken one does not
    # stop the run hours later: some minutes on COCO, once per start. [ours]
    cfg.DATALOADER.CHECK_IMAGES = True

    # Every VIS_PERIOD iterations (detectron2's key; 0 = never) this many pictures of the test
    # dataset with the largest vocabulary go to TensorBoard, ground truth beside detections. They
    # are always the same ones, chosen by their ground truth. docs/monitoring.md. [ours]
    cfg.TEST.VIS_PICTURES = 4

    # Images per process and step of an evaluation. More than one is faster, above all for small
    # images; images of different sizes are then padded to one, which changes scores near the
    # padding a little. 1 is detectron2's. [ours]
    cfg.TEST.IMS_PER_BATCH = 1

    # Datasets of your own: paths of YAML files that say where their COCO files lie and which names
    # are base and novel; they become <name>_train_base, <name>_val_novel, ... See
    # docs/custom_data.md. [ours]
    cfg.DATASETS.DEFINITIONS = ()
