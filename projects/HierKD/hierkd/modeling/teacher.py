"""The teacher: a frozen CLIP that embeds image regions and texts (paper §3.2, §3.3).

The detector sees the `Teacher` protocol; this module alone imports ``clip`` and knows CLIP's colour
order, pixel range, normalisation, input size and tokeniser.  A teacher is a plain object, not an
``nn.Module``: ``state_dict``, ``model.train()``, the optimiser and DDP cannot see it.

CLIP is loaded on the first call that really needs it.  Text embeddings are kept on disk, so that
evaluation and inference with known texts never load it; with a file of class embeddings
(``MODEL.TEXT_CLASSIFIER.EMBEDDINGS``) they do without CLIP's weights altogether.
"""

import contextlib
import hashlib
import logging
import os
import sqlite3
import urllib.parse
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from iopath.common.file_io import file_lock
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from hierkd.modeling.frozen_encoder import fold_batch_norms, make_batch
from hierkd.modeling.region_crops import crop_regions
from hierkd.modeling.text_embeddings import (
    TextEmbeddings,
    check_provenance,
    check_template,
    load_text_embeddings,
)
from hierkd.safe_files import is_torchscript, read_torch_file, read_torchscript_state_dict

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "CLIPTeacher",
    "StoredTextTeacher",
    "Teacher",
    "build_teacher",
    "check_embed_dim",
    "count_tokens",
    "encode_prompts",
    "import_clip",
    "known_weights_sha256",
]

logger = logging.getLogger(__name__)

# Mean and standard deviation of RGB pixels in [0, 1] that every released CLIP was trained with
# (the CLIP repository's `_transform`).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# What a crop is normalised with. The authors' code gives CLIP the detector's statistics, those of
# ImageNet: the teacher then sees some 20 % too much contrast.
_PIXEL_STATISTICS = {
    "clip": (CLIP_MEAN, CLIP_STD),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

# Regions and texts encoded per call. [ours] 512 crops of 224 x 224 are 0.3 GB in float32 before the
# first layer; 256 texts keep the text encoder of ViT-B/32 below 0.5 GB.
_REGIONS_PER_CALL = 512
_TEXTS_PER_CALL = 256
# On a GPU the number of regions of a call is filled up to a multiple of this. [ours] At most a few
# hundred regions come per step: some ten batch sizes, each with its kernels, instead of hundreds.
# The effect on a GPU is not measured; on a CPU nothing is filled up.
_REGIONS_MULTIPLE = 32
# A progress bar is shown when more texts than this have to be encoded. [ours] A smaller number is
# not worth a line of output.
_TEXTS_WITHOUT_PROGRESS = 2000
# Tokens that are counted; a longer text counts as this long.
_LONGEST_TEXT = 1024
# Text embeddings held in memory; the least recently used goes first. [ours] 128 MB at D = 512.
_TEXTS_IN_MEMORY = 65_536
# Characters of a text that reach CLIP's tokeniser, white space collapsed. [ours] CLIP reads 75
# tokens, some 300 characters; the tokeniser's time grows with the square of the length of a word,
# and one of 100,000 letters would take minutes.
_TEXT_LENGTH = 2000
# Seconds to wait while another process writes to the text cache. [ours]
_CACHE_TIMEOUT = 30.0
# Texts looked up in one SQL statement; SQLite before 3.32 allows 999 parameters.
_CACHE_LOOKUP = 900

# Entries of OpenAI's state dict from which `clip.model.build_model` reads the shape of the model.
_CLIP_ENTRIES = (
    "visual.conv1.weight",
    "text_projection",
    "positional_embedding",
    "token_embedding.weight",
    "ln_final.weight",
    "logit_scale",
)

_Vector = npt.NDArray[np.float32]


class Teacher(Protocol):
    """What the detector needs of a vision-language model with D-dim embeddings.

    All embeddings are float32, L2-normalised, without gradient, and may be used in losses.
    """

    @property
    def embed_dim(self) -> int:
        """D, the size of an embedding."""

    @property
    def logit_scale(self) -> float:
        """The model's own factor on cosines, for classifying with it directly."""

    def encode_regions(
        self, images: Sequence[Tensor], boxes: Sequence[Tensor], crop_scale: float
    ) -> Tensor:
        """Embed regions: N raw images (3, H_i, W_i) and N x (P_i, 4) XYXY pixels -> (P, D)."""

    def encode_captions(self, captions: Sequence[str]) -> Tensor:
        """Embed C texts as they are -> (C, D)."""

    def encode_classes(self, names: Sequence[str]) -> Tensor:
        """Embed K class names, each put into the prompt template(s) -> (K, D)."""


class CLIPTeacher:
    """A frozen CLIP in OpenAI's formats; implements `Teacher`.

    Args:
        weights: a name that ``clip.available_models()`` lists (downloaded and hash-checked by
            ``clip``), or the path of a TorchScript archive or a plain state dict.
        device: where CLIP runs and where embeddings are returned.
        image_format: order of the channels of the images, "RGB" or "BGR".
        template: prompt with one "{}" for the class name.
        templates: several of them, in place of `template`: a prompt ensemble.
        text_cache_dir: folder of the text cache; None or "" means
            ``$HIERKD_CACHE/text_embeddings``, where that variable defaults to ``~/.cache/hierkd``.
        download_root: folder of downloaded models; None or "" means clip's own ``~/.cache/clip``.
        precision: "fp16", "fp32", or "auto": half precision on a GPU, single on a CPU.
        pixel_statistics: mean and deviation of the pixels, "clip" or "imagenet".

    Raises:
        ValueError: unknown `image_format`, `precision` or `pixel_statistics`, or a template without
            exactly one "{}".
        FileNotFoundError: `weights` is neither a known name nor an existing file.
    """

    def __init__(
        self,
        weights: str,
        *,
        device: str | torch.device,
        image_format: str = "RGB",
        template: str = "a photo of a {}.",
        templates: Sequence[str] = (),
        text_cache_dir: str | None = None,
        download_root: str | None = None,
        precision: str = "auto",
        pixel_statistics: str = "clip",
    ) -> None:
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"INPUT.FORMAT: expected 'RGB' or 'BGR', found {image_format!r}")
        if precision not in ("auto", "fp16", "fp32"):
            raise ValueError(f"precision: expected 'auto', 'fp16' or 'fp32', found {precision!r}")
        if pixel_statistics not in _PIXEL_STATISTICS:
            raise ValueError(
                f"MODEL.TEACHER.PIXEL_STATISTICS must be one of {tuple(_PIXEL_STATISTICS)}, "
                f"got {pixel_statistics!r}"
            )
        if isinstance(templates, str):
            raise ValueError(
                "MODEL.TEXT_CLASSIFIER.TEMPLATES: expected a sequence of templates, found the text "
                f"{templates!r}"
            )
        check_template(template)
        for each in templates:
            check_template(each, "MODEL.TEXT_CLASSIFIER.TEMPLATES")
        self.weights = weights
        self.device = torch.device(device)
        self.image_format = image_format
        self.pixel_mean, self.pixel_std = _PIXEL_STATISTICS[pixel_statistics]
        self.templates = tuple(templates) or (template,)
        self.half = self.device.type == "cuda" if precision == "auto" else precision == "fp16"
        self._download_root = Path(download_root or "~/.cache/clip").expanduser()
        self._model: Any = None  # clip.model.CLIP, once loaded
        self._memory: OrderedDict[str, _Vector] = OrderedDict()
        self.weights_digest = _weights_digest(weights)  # SHA-256, hex
        folder = Path(text_cache_dir).expanduser() if text_cache_dir else _default_text_cache_dir()
        self._disk = _TextCache(folder / f"clip-{self.weights_digest[:32]}.sqlite")

    def __repr__(self) -> str:
        return f"CLIPTeacher(weights={self.weights!r}, device={str(self.device)!r})"

    @property
    def embed_dim(self) -> int:
        """D; from the text cache when it knows these weights, else from the loaded model."""
        if self._model is None and (cached := self._disk.properties()) is not None:
            return cached[0]
        return int(self._clip().text_projection.shape[1])

    @property
    def logit_scale(self) -> float:
        """CLIP's exp(logit_scale), 100 for the released models; found like `embed_dim`."""
        if self._model is None and (cached := self._disk.properties()) is not None:
            return cached[1]
        return float(self._clip().logit_scale.detach().float().exp())

    @property
    def loaded(self) -> bool:
        """Whether CLIP itself has been loaded."""
        return self._model is not None

    @torch.no_grad()
    def encode_regions(
        self, images: Sequence[Tensor], boxes: Sequence[Tensor], crop_scale: float
    ) -> Tensor:
        """Embed image regions, cut out as `region_crops.crop_regions` describes (§3.2).

        Args:
            images: N raw images (3, H_i, W_i), unpadded, values 0..255, channels in `image_format`.
            boxes: N tensors (P_i, 4), XYXY in absolute pixels of those images.
            crop_scale: factor on width and height of the boxes; 1.5 in the paper.

        Returns:
            (P, D) float32 on the teacher's device, L2-normalised, without gradient, in the order of
            the images, then of the boxes.
        """
        if len(images) != len(boxes):
            raise ValueError(f"found {len(images)} images but {len(boxes)} tensors of boxes")
        chunks = list(_chunks(images, boxes, _REGIONS_PER_CALL))
        if not chunks:
            return torch.zeros((0, self.embed_dim), device=self.device)
        with torch.inference_mode():
            embeddings = [self._encode_crops(*chunk, crop_scale) for chunk in chunks]
        # Made out here, it is a tensor that losses may use.
        return torch.cat(embeddings)

    def encode_captions(self, captions: Sequence[str]) -> Tensor:
        """Embed texts; each distinct one is encoded once and then comes from the cache.

        A text longer than CLIP's context is cut off at its end.

        Args:
            captions: C texts.

        Returns:
            (C, D) float32 on the teacher's device, L2-normalised, without gradient.

        Raises:
            ValueError: one is not a text.
        """
        if isinstance(captions, str):
            raise ValueError(f"expected a sequence of texts, found the single text {captions!r}")
        for index, caption in enumerate(captions):
            if not isinstance(caption, str):
                raise ValueError(f"caption {index} must be a text, found {caption!r}")
        if len(captions) == 0:
            return torch.zeros((0, self.embed_dim), device=self.device)
        rows = self._lookup(list(dict.fromkeys(captions)))
        return torch.from_numpy(np.stack([rows[text] for text in captions])).to(self.device)

    def encode_classes(self, names: Sequence[str]) -> Tensor:
        """Embed class names, each put into the prompt template.

        Of several templates, the normalised embeddings are averaged and normalised again, which is
        how CLIP's authors build a classifier from a prompt ensemble.

        Args:
            names: K class names.

        Returns:
            (K, D), as `encode_captions`.
        """
        return encode_prompts(self.encode_captions, self.templates, names)

    def _encode_crops(
        self, images: Sequence[Tensor], boxes: Sequence[Tensor], crop_scale: float
    ) -> Tensor:
        model = self._clip()
        rgb = [image.to(self.device) for image in images]
        if self.image_format == "BGR":
            rgb = [image.flip(0) for image in rgb]
        crops = crop_regions(
            rgb,
            boxes,
            size=model.visual.input_resolution,
            scale=crop_scale,
            mean=[255 * value for value in self.pixel_mean],
            std=[255 * value for value in self.pixel_std],
        )
        multiple = _REGIONS_MULTIPLE if self.device.type == "cuda" else 1
        # The student's mixed precision must not reach into the teacher.
        with torch.autocast(self.device.type, enabled=False):
            embeddings: Tensor = model.encode_image(make_batch(crops, model.dtype, multiple))
        return F.normalize(embeddings[: len(crops)].float(), dim=-1)

    def _lookup(self, texts: Sequence[str]) -> dict[str, _Vector]:
        """Embeddings of distinct texts, from memory, from disk, else from CLIP."""
        rows = {text: self._memory[text] for text in texts if text in self._memory}
        if missing := [text for text in texts if text not in rows]:
            rows |= self._disk.read(missing)
        if missing := [text for text in texts if text not in rows]:
            rows |= self._encode_texts(missing)
        for text in texts:
            self._memory[text] = rows[text]
            self._memory.move_to_end(text)
        while len(self._memory) > _TEXTS_IN_MEMORY:
            self._memory.popitem(last=False)
        return rows

    @torch.no_grad()
    def _encode_texts(self, texts: Sequence[str]) -> dict[str, _Vector]:
        model, clip = self._clip(), import_clip()
        rows: dict[str, _Vector] = {}
        with tqdm(
            total=len(texts),
            desc="Encoding texts with CLIP",
            unit="text",
            disable=len(texts) <= _TEXTS_WITHOUT_PROGRESS,
        ) as progress:
            for start in range(0, len(texts), _TEXTS_PER_CALL):
                chunk = list(texts[start : start + _TEXTS_PER_CALL])
                short = [_beginning(text) for text in chunk]
                tokens = clip.tokenize(short, context_length=model.context_length, truncate=True)
                with torch.autocast(self.device.type, enabled=False):
                    embeddings = model.encode_text(tokens.to(self.device))
                normalised = F.normalize(embeddings.float(), dim=-1).cpu().numpy()
                # copies: as a view, one row in use would hold all the others of its chunk
                new = {text: row.copy() for text, row in zip(chunk, normalised, strict=True)}
                # Written per chunk: what was encoded before an interruption is not lost.
                self._disk.write(new, self.embed_dim, self.logit_scale)
                rows |= new
                progress.update(len(chunk))
        return rows

    def _clip(self) -> Any:
        """The CLIP model, loaded on the first call: evaluation mode, no parameter trainable."""
        if self._model is None:
            path = _find_weights(self.weights, self._download_root)
            logger.info("Loading CLIP from %s", path)
            clip = import_clip()
            state_dict = _read_state_dict(path)
            vocabulary = len(clip.clip._tokenizer.encoder)
            _check_state_dict(path, state_dict, vocabulary)
            # Building draws initial values that are then overwritten: the run's random numbers must
            # not depend on whether the cache had the answer.  Parameters made inside inference mode
            # could not be used outside of it.
            with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
                model: Any = _build(clip, path, state_dict)
                model = model.float().to(self.device).eval().requires_grad_(False)
                # What the visual encoder computes stays the same up to rounding.
                fold_batch_norms(model.visual)
                if self.half:
                    clip.model.convert_weights(model)
                model.visual.to(memory_format=torch.channels_last)
            self._model = model
        return self._model


class StoredTextTeacher:
    """Class embeddings from a file, everything else from CLIP; implements `Teacher`.

    CLIP is built on the first call that needs it, so that classifying, and training without
    distillation, run where its weights are not.

    Args:
        stored: the file's content. A name that it lacks is an error, never encoded by CLIP:
            vocabularies are not to mix sources.
        build_clip: builds the teacher for regions, captions and the scale of the logits.
        device: where embeddings are returned.
    """

    def __init__(
        self,
        stored: TextEmbeddings,
        build_clip: Callable[[], Teacher],
        *,
        device: str | torch.device,
    ) -> None:
        self.stored = stored
        self.device = torch.device(device)
        self._build_clip = build_clip
        self._built: Teacher | None = None

    def __repr__(self) -> str:
        return f"StoredTextTeacher({self.stored.path!r})"

    @property
    def embed_dim(self) -> int:
        """D, of the file."""
        return self.stored.embed_dim

    @property
    def logit_scale(self) -> float:
        """CLIP's own; needs CLIP or its text cache."""
        return self._clip("CLIP's scale of the logits").logit_scale

    def encode_regions(
        self, images: Sequence[Tensor], boxes: Sequence[Tensor], crop_scale: float
    ) -> Tensor:
        """Embed regions with CLIP; see `CLIPTeacher.encode_regions`."""
        return self._clip("regions").encode_regions(images, boxes, crop_scale)

    def encode_captions(self, captions: Sequence[str]) -> Tensor:
        """Embed C texts -> (C, D): the background prompt from the file, other texts with CLIP.

        Raises:
            FileNotFoundError: CLIP is needed, and its weights are not there.
        """
        if len(captions) == 0:
            return torch.zeros((0, self.embed_dim), device=self.device)
        background = self.stored.background_embedding
        if background is not None and set(captions) == {self.stored.background_prompt}:
            return torch.from_numpy(background).to(self.device).repeat(len(captions), 1)
        needing = f"{captions[0]!r}" if len(captions) == 1 else f"{len(captions)} texts"
        clip = self._clip(needing)
        try:
            return clip.encode_captions(captions)
        except FileNotFoundError as error:
            raise self._needs_clip(needing, error) from error

    def encode_classes(self, names: Sequence[str]) -> Tensor:
        """Embeddings of K class names, from the file -> (K, D).

        Raises:
            ValueError: the file lacks a name.
        """
        _check_sequence_of_names(names)
        return torch.from_numpy(self.stored.rows_of(names)).to(self.device)

    def _clip(self, needing: str) -> Teacher:
        if self._built is None:
            try:
                built = self._build_clip()
                embed_dim = built.embed_dim
            except FileNotFoundError as error:
                raise self._needs_clip(needing, error) from error
            if embed_dim != self.embed_dim:
                raise ValueError(
                    f"{self.stored.path}: embeddings of size {self.embed_dim}, but {built!r} gives "
                    f"embeddings of size {embed_dim}: MODEL.TEACHER.WEIGHTS is another CLIP"
                )
            self._built = built
        return self._built

    def _needs_clip(self, needing: str, error: FileNotFoundError) -> FileNotFoundError:
        return FileNotFoundError(
            f"{self.stored.path} does not hold {needing}, which therefore needs CLIP: {error}"
        )


def build_teacher(cfg: Any) -> Teacher:
    """Build the teacher that a config describes.

    Reads MODEL.TEACHER.{WEIGHTS, TEXT_CACHE_DIR, DOWNLOAD_ROOT, PIXEL_STATISTICS},
    MODEL.TEXT_CLASSIFIER.{TEMPLATE, TEMPLATES, EMBEDDINGS, EMBED_DIM}, MODEL.DEVICE and
    INPUT.FORMAT.

    Raises:
        FileNotFoundError: EMBEDDINGS names no file, or, where CLIP is needed, WEIGHTS.
        ValueError: a wrong template, or the file of EMBEDDINGS is broken, of another size than
            EMBED_DIM, or made with another CLIP or other templates.
    """
    text = cfg.MODEL.TEXT_CLASSIFIER

    def build_clip() -> CLIPTeacher:
        return CLIPTeacher(
            cfg.MODEL.TEACHER.WEIGHTS,
            device=cfg.MODEL.DEVICE,
            image_format=cfg.INPUT.FORMAT,
            template=text.TEMPLATE,
            templates=text.TEMPLATES,
            text_cache_dir=cfg.MODEL.TEACHER.TEXT_CACHE_DIR,
            download_root=cfg.MODEL.TEACHER.DOWNLOAD_ROOT,
            pixel_statistics=cfg.MODEL.TEACHER.PIXEL_STATISTICS,
        )

    if not text.EMBEDDINGS:
        return build_clip()
    stored = load_text_embeddings(text.EMBEDDINGS)
    if stored.embed_dim != text.EMBED_DIM:
        raise ValueError(
            f"{stored.path}: embeddings of size {stored.embed_dim}, but "
            f"MODEL.TEXT_CLASSIFIER.EMBED_DIM is {text.EMBED_DIM}"
        )
    weights = cfg.MODEL.TEACHER.WEIGHTS
    unknown = check_provenance(
        stored,
        weights=weights,
        weights_sha256=known_weights_sha256(weights),
        templates=text.TEMPLATES or (text.TEMPLATE,),
    )
    if unknown:
        logger.warning("%s is used unchecked: %s", stored.path, "; ".join(unknown))
    return StoredTextTeacher(stored, build_clip, device=cfg.MODEL.DEVICE)


def check_embed_dim(
    teacher: Teacher, expected: int, key: str = "MODEL.TEXT_CLASSIFIER.EMBED_DIM"
) -> None:
    """Raise ValueError unless the teacher's embeddings have the size that `key` promises."""
    if teacher.embed_dim != expected:
        raise ValueError(
            f"{key} is {expected}, but {teacher!r} gives embeddings of size {teacher.embed_dim}: "
            f"set {key} to {teacher.embed_dim}, or MODEL.TEACHER.WEIGHTS to a CLIP of size "
            f"{expected}"
        )


def encode_prompts(
    encode_texts: Callable[[Sequence[str]], Tensor], templates: Sequence[str], names: Sequence[str]
) -> Tensor:
    """Embed class names, each put into every template.

    Of several templates, the normalised embeddings are averaged and normalised again, which is how
    CLIP's authors build a classifier from a prompt ensemble.

    Args:
        encode_texts: C texts -> (C, D), L2-normalised.
        templates: at least one, each with one "{}".
        names: K class names.

    Returns:
        (K, D), L2-normalised.
    """
    _check_sequence_of_names(names)
    per_template = [
        encode_texts([template.format(name) for name in names]) for template in templates
    ]
    if len(per_template) == 1:
        return per_template[0]
    return F.normalize(torch.stack(per_template).mean(dim=0), dim=-1)


def count_tokens(texts: Sequence[str]) -> list[int]:
    """How many tokens CLIP makes of each text, start and end included; needs no weights."""
    tokens = import_clip().tokenize(list(texts), context_length=_LONGEST_TEXT, truncate=True)
    return [int(end) + 1 for end in tokens.argmax(dim=1)]  # the end has the highest number of all


def known_weights_sha256(weights: str) -> str | None:
    """SHA-256 (hex) of CLIP's weights, None if they are neither a file nor a published model."""
    if os.path.isfile(weights) or weights in _model_urls():
        return _weights_digest(weights)
    return None


def _check_sequence_of_names(names: Sequence[str]) -> None:
    if isinstance(names, str):
        raise ValueError(f"expected a sequence of class names, found the single name {names!r}")


def _default_text_cache_dir() -> Path:
    root = os.environ.get("HIERKD_CACHE") or "~/.cache/hierkd"
    return Path(root).expanduser() / "text_embeddings"


def _chunks(
    images: Sequence[Tensor], boxes: Sequence[Tensor], limit: int
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Split into parts of at most `limit` boxes, in order; images without boxes are left out."""
    part_images: list[Tensor] = []
    part_boxes: list[Tensor] = []
    room = limit
    for image, image_boxes in zip(images, boxes, strict=True):
        start = 0
        while start < len(image_boxes):
            piece = image_boxes[start : start + room]
            part_images.append(image)
            part_boxes.append(piece)
            start += len(piece)
            room -= len(piece)
            if room == 0:
                yield part_images, part_boxes
                part_images, part_boxes, room = [], [], limit
    if part_images:
        yield part_images, part_boxes


# --- CLIP's files ---------------------------------------------------------------------------------


def import_clip() -> ModuleType:
    """Import ``clip`` without the deprecation warning of the `pkg_resources` that it imports."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
        warnings.filterwarnings("ignore", message="Deprecated call to `pkg_resources")
        import clip
    module: ModuleType = clip
    return module


def _model_urls() -> dict[str, str]:
    urls: dict[str, str] = import_clip().clip._MODELS
    return urls


def _weights_digest(weights: str) -> str:
    """SHA-256 (hex) of the weights; for a named model it is part of the URL, nothing is read."""
    if os.path.isfile(weights):
        with open(weights, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    urls = _model_urls()
    if weights not in urls:
        raise FileNotFoundError(
            f"MODEL.TEACHER.WEIGHTS: {weights!r} is neither an existing file nor one of the CLIP "
            f"models {', '.join(urls)}"
        )
    return urls[weights].split("/")[-2]


def _find_weights(weights: str, download_root: Path) -> Path:
    """Path of the weights; a named model is downloaded and hash-checked by ``clip``."""
    if os.path.isfile(weights):
        return Path(weights)
    url = _model_urls()[weights]
    target = download_root / os.path.basename(urllib.parse.urlparse(url).path)
    put = f"download {url} to {target}, or set MODEL.TEACHER.WEIGHTS to the path of the file"
    try:
        download_root.mkdir(parents=True, exist_ok=True)
        with file_lock(str(target)):  # several processes of one machine start at the same time
            return Path(import_clip().clip._download(url, str(download_root)))
    except OSError as error:  # includes URLError: no network, no space, no permission
        wrong = " (the file is there, but is not the published one)" if target.exists() else ""
        raise FileNotFoundError(
            f"the weights of CLIP {weights!r} are not at {target}{wrong} and could not be "
            f"downloaded ({error}); {put}"
        ) from error
    except RuntimeError as error:  # how clip reports a hash mismatch or a folder in the way
        raise ValueError(f"{target} is not the published CLIP {weights!r} ({error}); {put}") from (
            error
        )


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a TorchScript archive or a plain state dict; nothing that the file holds is run."""
    try:
        read = read_torchscript_state_dict if is_torchscript(path) else read_torch_file
        loaded: Any = read(path)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as a CLIP, neither as a TorchScript archive nor as a state "
            f"dict: {error}"
        ) from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: expected a state dict, found a {type(loaded).__name__}")
    return dict(loaded)


def _check_state_dict(path: Path, state_dict: dict[str, Tensor], vocabulary: int) -> None:
    missing = [key for key in _CLIP_ENTRIES if not isinstance(state_dict.get(key), Tensor)]
    if missing:
        raise ValueError(
            f"{path} is not a CLIP in OpenAI's format: it has no {', '.join(missing)}; it has "
            f"{', '.join(list(map(str, state_dict))[:5])}{', ...' if len(state_dict) > 5 else ''}"
        )
    rows = len(state_dict["token_embedding.weight"])
    if rows != vocabulary:
        raise ValueError(
            f"{path}: token_embedding.weight has {rows} rows, CLIP's tokeniser knows {vocabulary} "
            f"tokens"
        )


def _build(clip: ModuleType, path: Path, state_dict: dict[str, Tensor]) -> nn.Module:
    try:
        model: nn.Module = clip.model.build_model(dict(state_dict))
    except (AssertionError, KeyError, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(f"{path} is not a CLIP in OpenAI's format: {error}") from error
    return model


# --- Text embeddings on disk ----------------------------------------------------------------------


class _TextCache:
    """Normalised text embeddings of one set of CLIP weights in an SQLite file.

    Rows hold the SHA-256 of the exact text, the text itself for inspection, and D float32 values
    (little-endian, L2-normalised, in the precision of the process that wrote them first), followed
    by a CRC-32 of both, since SQLite does not notice what happens to its pages.  A second table
    holds the model's D and exp(logit_scale).

    Any number of processes may share the file.  It keeps SQLite's rollback journal, which unlike
    the write-ahead log works on network file systems, and is opened anew for each operation, so
    that nothing is carried through a fork.  A cache is never worth a crash: a corrupted file is set
    aside and begun anew, one that cannot be used is passed over, each with a warning.

    Args:
        path: the file; it and its folder are created by the first write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._properties: tuple[int, float] | None = None
        self._warned = False

    def properties(self) -> tuple[int, float] | None:
        """(D, exp(logit_scale)) of the model, or None when nothing is stored yet."""
        if self._properties is None and self.path.exists():
            with self._guard(), self._connect() as connection:
                # The other process may not have got further than creating the file.
                query = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'model'"
                if connection.execute(query).fetchone() is not None:
                    query = "SELECT embed_dim, logit_scale FROM model"
                    embed_dim, logit_scale = connection.execute(query).fetchone()
                    if not (int(embed_dim) > 0 and 0 < float(logit_scale) < np.inf):
                        raise ValueError(f"a model of D = {embed_dim}, scale {logit_scale}")
                    self._properties = (int(embed_dim), float(logit_scale))
        return self._properties

    def read(self, texts: Sequence[str]) -> dict[str, _Vector]:
        """Embeddings of those texts that are stored."""
        found: dict[str, _Vector] = {}
        properties = self.properties()
        if properties is None:
            return found
        by_key = {_text_key(text): text for text in texts}
        keys = list(by_key)
        with self._guard(), self._connect() as connection:
            for start in range(0, len(keys), _CACHE_LOOKUP):
                part = keys[start : start + _CACHE_LOOKUP]
                marks = ",".join("?" * len(part))
                query = f"SELECT key, embedding FROM texts WHERE key IN ({marks})"
                for key, blob in connection.execute(query, part):
                    vector = _checked_vector(key, blob, properties[0])
                    length = np.linalg.norm(vector.astype(np.float64))
                    if len(vector) and abs(length - 1) < 0.01:  # not NaN
                        found[by_key[key]] = vector
        return found

    def write(self, embeddings: dict[str, _Vector], embed_dim: int, logit_scale: float) -> None:
        """Store embeddings; texts that are there already are replaced."""
        rows = [
            (key := _text_key(text), _encodable(text), _with_checksum(key, vector))
            for text, vector in embeddings.items()
        ]
        with self._guard():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._connect() as connection, connection:  # one transaction
                connection.execute("BEGIN IMMEDIATE")
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS model "
                    "(id INTEGER PRIMARY KEY CHECK (id = 0), embed_dim INTEGER, logit_scale REAL)"
                )
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS texts "
                    "(key TEXT PRIMARY KEY, text TEXT, embedding BLOB) WITHOUT ROWID"
                )
                connection.execute(
                    "INSERT OR REPLACE INTO model VALUES (0, ?, ?)", (embed_dim, logit_scale)
                )
                connection.executemany("INSERT OR REPLACE INTO texts VALUES (?, ?, ?)", rows)

    @contextlib.contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self.path, timeout=_CACHE_TIMEOUT, isolation_level=None)
        try:
            # Without waiting for the disk: what a power cut may corrupt can be computed again.
            connection.execute("PRAGMA synchronous = OFF")
            yield connection
        finally:
            connection.close()

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """Turn trouble with the file into warnings."""
        try:
            yield
        except (sqlite3.OperationalError, OSError) as error:
            if not self._warned:
                logger.warning("Text cache %s cannot be used: %s", self.path, error)
                self._warned = True
        except (sqlite3.DatabaseError, TypeError, ValueError) as error:
            aside = self.path.with_name(f"{self.path.name}.corrupt")
            logger.warning(
                "Text cache %s is corrupted (%s); it is moved to %s and begun anew",
                *(self.path, error, aside),
            )
            with contextlib.suppress(OSError):
                os.replace(self.path, aside)
                self.path.with_name(f"{self.path.name}-journal").unlink(missing_ok=True)


def _with_checksum(key: str, vector: _Vector) -> bytes:
    """What is stored of an embedding."""
    values = vector.astype("<f4").tobytes()
    return values + zlib.crc32(key.encode() + values).to_bytes(4, "little")


def _checked_vector(key: str, blob: bytes, embed_dim: int) -> _Vector:
    """The embedding (D,) in `blob`; empty if it is of another size or not as it was written."""
    values = blob[: 4 * embed_dim]
    checksum = zlib.crc32(key.encode() + values).to_bytes(4, "little")
    # Rows of before there were checksums have none.
    if len(values) < 4 * embed_dim or blob[4 * embed_dim :] not in (b"", checksum):
        return np.zeros(0, np.float32)
    return np.frombuffer(values, dtype="<f4").astype(np.float32)


def _text_key(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _beginning(text: str) -> str:
    """As much of a text as can matter to CLIP; one of ordinary length is left as it is."""
    if len(text) <= _TEXT_LENGTH:
        return text
    return " ".join(text.split())[:_TEXT_LENGTH]


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")
