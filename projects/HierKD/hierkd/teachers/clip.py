"""The teacher: a frozen CLIP that embeds image regions and texts (paper §3.2, §3.3).

The detector sees the `Teacher` protocol and knows nothing of CLIP's colour order, pixel range,
normalisation, input size and tokeniser; `openai_clip` and `open_clip` load the models of the two
packages. A teacher is a plain object, not an ``nn.Module``: ``state_dict``, ``model.train()``, the
optimiser and DDP cannot see it.

CLIP is loaded on the first call that needs it. Texts come from stored class embeddings
(``MODEL.TEXT_CLASSIFIER.EMBEDDINGS``, or those a training left in its folder), a cache of the
teacher (``MODEL.TEACHER.CACHE``), the text cache on disk, and only then from CLIP.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import hierkd
from hierkd.files import cache_root
from hierkd.teachers.crops import crop_regions
from hierkd.teachers.open_clip import (
    OPEN_CLIP_PREFIX,
    OpenCLIPFiles,
    known_open_clip_digest,
)
from hierkd.teachers.openai_clip import OpenAIFiles
from hierkd.teachers.protocol import LoadedCLIP, Teacher
from hierkd.teachers.region_cache import RegionCache
from hierkd.teachers.text_cache import TextCache, Vector
from hierkd.teachers.texts import (
    OWN_EMBEDDINGS,
    TextEmbeddings,
    check_provenance,
    check_template,
    load_text_embeddings,
    make_text_embeddings,
)

__all__ = [
    "CLIPTeacher",
    "build_region_cache",
    "build_teacher",
    "check_embed_dim",
    "known_weights_sha256",
]

logger = logging.getLogger(__name__)

# What a crop is normalised with: None = as the teacher's own preprocessing says. The authors' code
# gives CLIP the detector's statistics, those of ImageNet: the teacher then sees some 20 % too much
# contrast.
_PIXEL_STATISTICS = {
    "clip": None,
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
_REGIONS_PER_CALL = 512  # 0.3 GB of pixels at 224 x 224
_TEXTS_PER_CALL = 256
_TEXTS_WITHOUT_PROGRESS = 2000  # more show a progress bar
_TEXTS_IN_MEMORY = 65_536  # 128 MB at D = 512


class CLIPTeacher:
    """A frozen CLIP, OpenAI's or open_clip's; implements `Teacher`.

    Args:
        weights: "open_clip:..." (see `OpenCLIPFiles`), else see `OpenAIFiles`.
        device: where CLIP runs and where embeddings are returned.
        image_format: order of the channels of the images, "RGB" or "BGR".
        templates: prompts with one "{}" for the class name; several are a prompt ensemble.
        text_cache_dir: folder of the text cache; None or "" means
            ``$HIERKD_CACHE/text_embeddings``, where that variable defaults to ``~/.cache/hierkd``.
        download_root: folder of downloaded models; None or "" means the package's own.
        precision: "fp16", "fp32", or "auto": half precision on a GPU, single on a CPU.
        pixel_statistics: mean and deviation of the pixels, "clip" (the model's own) or "imagenet".
        stored: embeddings of class names and of the background prompt. A class name that it lacks
            is an error, never encoded by CLIP: vocabularies are not to mix sources.
        stored_only: False: the source is this very CLIP, and encodes what they lack.
        cache: embeddings of texts, looked up before CLIP is asked.

    Raises:
        ValueError: a wrong `image_format`, `pixel_statistics` or template.
        FileNotFoundError: `weights` names nothing that is known or exists. With `stored` or `cache`
            this is raised when CLIP is first needed.
    """

    def __init__(
        self,
        weights: str,
        *,
        device: str | torch.device,
        image_format: str = "RGB",
        templates: Sequence[str] = ("a photo of a {}.",),
        text_cache_dir: str | None = None,
        download_root: str | None = None,
        precision: str = "auto",
        pixel_statistics: str = "clip",
        stored: TextEmbeddings | None = None,
        stored_only: bool = True,
        cache: RegionCache | None = None,
    ) -> None:
        for key, value, choices in (
            ("INPUT.FORMAT", image_format, ("RGB", "BGR")),
            ("MODEL.TEACHER.PIXEL_STATISTICS", pixel_statistics, tuple(_PIXEL_STATISTICS)),
        ):
            if value not in choices:
                raise ValueError(f"{key} must be one of {choices}, found {value!r}")
        for template in templates:
            check_template(template, "MODEL.TEXT_CLASSIFIER.TEMPLATES (or TEMPLATE)")
        self.weights = weights
        self.device = torch.device(device)
        self.image_format = image_format
        self.pixel_statistics = pixel_statistics
        self.templates = tuple(templates)
        self.half = self.device.type == "cuda" if precision == "auto" else precision == "fp16"
        self.stored = stored
        self.stored_only = stored_only
        self.cache = cache
        self._download_root = download_root
        self._text_cache_dir = text_cache_dir
        self._loaded: LoadedCLIP | None = None
        self._memory: dict[str, Vector] = {}
        if stored is None and cache is None:
            _ = self._files  # what is misspelt is found now

    def __repr__(self) -> str:
        return f"CLIPTeacher(weights={self.weights!r}, device={str(self.device)!r})"

    @cached_property
    def _files(self) -> OpenAIFiles | OpenCLIPFiles:
        kind = OpenCLIPFiles if self.weights.startswith(OPEN_CLIP_PREFIX) else OpenAIFiles
        return kind(self.weights, self._download_root)

    @cached_property
    def _disk(self) -> TextCache:
        """The text cache; half precision gives other rows than single."""
        folder = (
            Path(self._text_cache_dir).expanduser()
            if self._text_cache_dir
            else cache_root() / "text_embeddings"
        )
        precision = "-fp16" if self.half else ""
        return TextCache(folder / f"clip-{self.weights_digest[:32]}{precision}.sqlite")

    @property
    def title(self) -> str:
        """Name of the CLIP without folders of this machine."""
        return self._files.title

    @property
    def weights_digest(self) -> str:
        """SHA-256 (hex) of the weights; of open_clip's models, of the architecture, too."""
        return self._files.digest

    @property
    def embed_dim(self) -> int:
        """D; known without CLIP of stored embeddings, caches and published models."""
        if self.stored is not None:
            return self.stored.embed_dim
        if self.cache is not None:
            return self.cache.contents.embed_dim
        if self._loaded is None and self._files.embed_dim is not None:
            return self._files.embed_dim
        if self._loaded is None and (cached := self._disk.properties()) is not None:
            return cached[0]
        return self._clip("the size of its embeddings").embed_dim

    @property
    def logit_scale(self) -> float:
        """CLIP's exp(logit_scale), 100 for OpenAI's."""
        if self.cache is not None:
            return self.cache.contents.logit_scale
        needing = "CLIP's scale of the logits"
        with self._saying_what_lacks(needing):
            cached = None if self._loaded else self._disk.properties()
        return self._clip(needing).logit_scale if cached is None else cached[1]

    @torch.no_grad()
    def encode_regions(
        self, images: Sequence[Tensor], boxes: Sequence[Tensor], crop_scale: float
    ) -> Tensor:
        """Embed image regions, cut out as `crops.crop_regions` describes (§3.2).

        Args:
            images: N raw images (3, H_i, W_i), unpadded, values 0..255, channels in `image_format`.
            boxes: N tensors (P_i, 4), XYXY in absolute pixels of those images.
            crop_scale: factor on width and height of the boxes; 1.5 in the paper's Table 2.

        Returns:
            (P, D) float32 on the teacher's device, L2-normalised, without gradient, in the order of
            the images, then of the boxes.
        """
        counts = torch.tensor([len(each) for each in boxes])
        if not counts.any():
            return torch.zeros((0, self.embed_dim), device=self.device)
        embeddings = []
        owners = torch.arange(len(boxes)).repeat_interleave(counts).split(_REGIONS_PER_CALL)
        parts = torch.cat(list(boxes)).split(_REGIONS_PER_CALL)
        with torch.inference_mode():
            for part, owner in zip(parts, owners, strict=True):
                indices, counts = owner.unique_consecutive(return_counts=True)
                of_part = [images[index] for index in indices]
                embeddings.append(
                    self._encode_crops(of_part, part.split(counts.tolist()), crop_scale)
                )
        return torch.cat(embeddings)  # made out here, it is a tensor that losses may use

    def encode_captions(self, captions: Sequence[str]) -> Tensor:
        """Embed texts; each distinct one is encoded once and then comes from the cache.

        A text longer than CLIP's context is cut off at its end.

        Args:
            captions: C texts.

        Returns:
            (C, D) float32 on the teacher's device, L2-normalised, without gradient.

        Raises:
            FileNotFoundError: CLIP is needed, and its weights are not there.
        """
        if len(captions) == 0:
            return torch.zeros((0, self.embed_dim), device=self.device)
        rows = self._lookup(list(dict.fromkeys(captions)))
        return torch.from_numpy(np.stack([rows[text] for text in captions])).to(self.device)

    def encode_classes(self, names: Sequence[str]) -> Tensor:
        """Embed class names, each put into the prompt template(s).

        Of several templates, the normalised embeddings are averaged and normalised again, which is
        how CLIP's authors build a classifier from a prompt ensemble.

        Args:
            names: K class names.

        Returns:
            (K, D), as `encode_captions`.

        Raises:
            ValueError: stored embeddings are in use, and they lack a name.
        """
        if (stored := self.stored) is not None:
            known = [name for name in names if self.stored_only or name in stored.names]
            rows = torch.from_numpy(stored.rows_of(known)).to(self.device)
            if len(known) == len(names):
                return rows
            others = [name for name in names if name not in stored.names]
            row_of = dict(zip((*known, *others), (*rows, *self._encode_names(others)), strict=True))
            return torch.stack([row_of[name] for name in names])
        return self._encode_names(names)

    def _encode_names(self, names: Sequence[str]) -> Tensor:
        """What the texts that the templates make of the names give."""
        each = [self.encode_captions([t.format(name) for name in names]) for t in self.templates]
        if len(each) == 1:
            return each[0]
        return F.normalize(torch.stack(each).mean(dim=0), dim=-1)

    def text_embeddings(self, names: Sequence[str], background_prompt: str) -> TextEmbeddings:
        """Embed class names and the background for a file, which says as far as known by what."""
        known: dict[str, Any] = {"templates": self.templates, "version": hierkd.__version__}
        with suppress(FileNotFoundError):  # stored embeddings or a cache took CLIP's place
            known |= {"clip": self.title, "weights_sha256": self.weights_digest}
        return make_text_embeddings(
            names,
            self.encode_classes(names).cpu().numpy(),
            background=self.encode_captions([background_prompt])[0].cpu().numpy(),
            background_prompt=background_prompt,
            **known,
        )

    def _encode_crops(
        self, images: Sequence[Tensor], boxes: Sequence[Tensor], crop_scale: float
    ) -> Tensor:
        clip = self._clip("regions")
        rgb = [image.to(self.device) for image in images]
        if self.image_format == "BGR":
            rgb = [image.flip(0) for image in rgb]
        statistics = _PIXEL_STATISTICS[self.pixel_statistics]
        mean, std = statistics or (clip.pixel_mean, clip.pixel_std)
        crops = crop_regions(
            rgb,
            boxes,
            size=clip.input_size,
            scale=crop_scale,
            mean=[255 * value for value in mean],
            std=[255 * value for value in std],
        ).to(dtype=clip.dtype, memory_format=torch.channels_last)
        # The student's mixed precision must not reach into the teacher.
        with torch.autocast(self.device.type, enabled=False):
            embeddings: Tensor = clip.model.encode_image(crops)
        return F.normalize(embeddings.float(), dim=-1)

    def _lookup(self, texts: Sequence[str]) -> dict[str, Vector]:
        """Embeddings of distinct texts: from what is at hand, from disk, else from CLIP."""
        rows = {text: self._memory[text] for text in texts if text in self._memory}
        stored = self.stored
        if stored is not None and stored.background_embedding is not None:
            rows.setdefault(stored.background_prompt, stored.background_embedding)
        if self.cache is not None and (missing := [t for t in texts if t not in rows]):
            rows |= self.cache.texts(missing)
        if missing := [text for text in texts if text not in rows]:
            with self._saying_what_lacks(repr(missing[0])):
                rows |= self._disk.read(missing)
            if missing := [text for text in missing if text not in rows]:
                rows |= self._encode_texts(missing)
        if len(self._memory) + len(rows) > _TEXTS_IN_MEMORY:
            self._memory.clear()
        self._memory |= rows
        return rows

    @torch.no_grad()
    def _encode_texts(self, texts: Sequence[str]) -> dict[str, Vector]:
        clip = self._clip(repr(texts[0]))
        rows: dict[str, Vector] = {}
        chunks = [texts[i : i + _TEXTS_PER_CALL] for i in range(0, len(texts), _TEXTS_PER_CALL)]
        quiet = len(texts) <= _TEXTS_WITHOUT_PROGRESS
        for chunk in tqdm(chunks, desc="Encoding texts with CLIP", disable=quiet):
            tokens = clip.tokenize(chunk)
            with torch.autocast(self.device.type, enabled=False):
                embeddings = clip.model.encode_text(tokens.to(self.device))
            normalised = F.normalize(embeddings.float(), dim=-1).cpu().numpy()
            new = dict(zip(chunk, normalised, strict=True))
            # Written per chunk: what was encoded before an interruption is not lost.
            self._disk.write(new, clip.embed_dim, clip.logit_scale)
            rows |= new
        return rows

    def _clip(self, needing: str) -> LoadedCLIP:
        """CLIP, loaded on the first call; `needing` says what asks for it."""
        if self._loaded is None:
            with self._saying_what_lacks(needing):
                logger.info("Loading CLIP %s", self.weights)
                # Building draws initial values that are then overwritten: the run's random numbers
                # must not depend on whether the cache had the answer. Parameters made inside
                # inference mode could not be used outside of it.
                with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
                    loaded = self._files.load(self.device, self.half)
                    loaded.model.visual.to(memory_format=torch.channels_last)
            self._loaded = loaded
        return self._loaded

    @property
    def _at_hand(self) -> str:
        """The file or folder that texts are looked up in before CLIP is asked, "" for none."""
        if self.stored is not None:
            return self.stored.path
        return "" if self.cache is None else str(self.cache.folder)

    @contextmanager
    def _saying_what_lacks(self, needing: str) -> Iterator[None]:
        """Let a message about CLIP's missing weights say why they are needed."""
        try:
            yield
        except FileNotFoundError as error:
            if not self._at_hand:
                raise
            raise FileNotFoundError(
                f"{self._at_hand} does not hold {needing}, which therefore needs CLIP: {error}"
            ) from error


def build_teacher(cfg: Any) -> CLIPTeacher:
    """Build the teacher that a config describes.

    Reads MODEL.TEACHER, MODEL.TEXT_CLASSIFIER, MODEL.IKD, MODEL.DEVICE, INPUT.FORMAT and, with a
    cache, DATASETS.TRAIN.

    Raises:
        FileNotFoundError: EMBEDDINGS names no file, CACHE no complete cache, or, where CLIP is
            needed, WEIGHTS nothing.
        ValueError: a wrong template; EMBEDDINGS or CACHE is broken, of another size than EMBED_DIM,
            or made with another CLIP, other templates, boxes or crops.
    """
    text, teacher = cfg.MODEL.TEXT_CLASSIFIER, cfg.MODEL.TEACHER
    if text.TEMPLATES_FILE:
        raise ValueError(
            "MODEL.TEXT_CLASSIFIER.TEMPLATES_FILE is not read yet: read the config with "
            "hierkd.load_config.load_config, which puts its templates into TEMPLATES"
        )
    templates = tuple(text.TEMPLATES) or (text.TEMPLATE,)
    given = text.EMBEDDINGS
    return CLIPTeacher(
        teacher.WEIGHTS,
        device=cfg.MODEL.DEVICE,
        image_format=cfg.INPUT.FORMAT,
        templates=templates,
        text_cache_dir=teacher.TEXT_CACHE_DIR,
        download_root=teacher.DOWNLOAD_ROOT,
        pixel_statistics=teacher.PIXEL_STATISTICS,
        stored=_build_stored(cfg, given, templates) if given else _build_own(cfg, templates),
        stored_only=bool(given),
        cache=build_region_cache(cfg) if teacher.CACHE else None,
    )


def _build_stored(cfg: Any, path: Path, templates: tuple[str, ...]) -> TextEmbeddings:
    text, weights = cfg.MODEL.TEXT_CLASSIFIER, cfg.MODEL.TEACHER.WEIGHTS
    stored = load_text_embeddings(path)
    if stored.embed_dim != text.EMBED_DIM:
        raise ValueError(
            f"{stored.path}: embeddings of size {stored.embed_dim}, but "
            f"MODEL.TEXT_CLASSIFIER.EMBED_DIM is {text.EMBED_DIM}: they are of another CLIP; set "
            f'MODEL.TEXT_CLASSIFIER.EMBEDDINGS to a file of the detector\'s, or to ""'
        )
    digest = known_weights_sha256(weights, cfg.MODEL.TEACHER.DOWNLOAD_ROOT)
    check_provenance(stored, weights=weights, weights_sha256=digest, templates=templates)
    return stored


def _build_own(cfg: Any, templates: tuple[str, ...]) -> TextEmbeddings | None:
    """What the training in OUTPUT_DIR left, for a detector that distils nothing any more."""
    path = Path(cfg.OUTPUT_DIR, OWN_EMBEDDINGS)
    if cfg.MODEL.IKD.LOSS_WEIGHT > 0 or not path.is_file():
        return None
    try:
        return _build_stored(cfg, path, templates)
    except ValueError as error:  # of another CLIP or other prompts, as an override may want it
        logger.info("Not used: %s", error)
        return None


def build_region_cache(cfg: Any) -> RegionCache:
    """Open the cache of MODEL.TEACHER.CACHE, and refuse one of another training.

    Regions are checked only where they are used, that is, with instance-level distillation.

    Raises:
        FileNotFoundError: there is no complete cache.
        ValueError: the cache is of another CLIP, other annotations, crops or proposals, or
            MODEL.IKD.BOXES are not the ground truth's.
    """
    ikd, teacher = cfg.MODEL.IKD, cfg.MODEL.TEACHER
    if (with_regions := ikd.LOSS_WEIGHT > 0) and ikd.BOXES != "gt":
        raise ValueError(
            "MODEL.TEACHER.CACHE holds embeddings of ground-truth boxes, but MODEL.IKD.BOXES is "
            f"{ikd.BOXES!r}: set MODEL.IKD.BOXES gt, or MODEL.TEACHER.CACHE ''"
        )
    cache = RegionCache(teacher.CACHE)
    key = "MODEL.TEXT_CLASSIFIER.EMBED_DIM"
    cache.check(embed_dim=(cfg.MODEL.TEXT_CLASSIFIER.EMBED_DIM, key))
    digest = known_weights_sha256(teacher.WEIGHTS, teacher.DOWNLOAD_ROOT)
    key = f"MODEL.TEACHER.WEIGHTS {teacher.WEIGHTS!r}"
    if digest is None:
        logger.warning("%s is used unchecked: %s is not at hand", cache.folder, key)
    else:
        cache.check(weights_sha256=(digest, f"{key}; the cache is of {cache.contents.clip!r}"))
    if with_regions:
        cache.check(
            crop_scale=(ikd.CROP_SCALE, "MODEL.IKD.CROP_SCALE"),
            pixel_statistics=(teacher.PIXEL_STATISTICS, "MODEL.TEACHER.PIXEL_STATISTICS"),
            proposals_per_image=(ikd.PROPOSALS_PER_IMAGE, "MODEL.IKD.PROPOSALS_PER_IMAGE"),
        )
        cache.check_annotations(
            {name: MetadataCatalog.get(name).json_file for name in cfg.DATASETS.TRAIN}
        )
    return cache


def check_embed_dim(teacher: Teacher, expected: int) -> None:
    """Raise ValueError unless the teacher's embeddings have the size EMBED_DIM."""
    key = "MODEL.TEXT_CLASSIFIER.EMBED_DIM"
    if teacher.embed_dim != expected:
        raise ValueError(
            f"{key} is {expected}, but {teacher!r} gives embeddings of size {teacher.embed_dim}: "
            f"set {key} to {teacher.embed_dim}, or MODEL.TEACHER.WEIGHTS to a CLIP of size "
            f"{expected}"
        )


def known_weights_sha256(weights: str, download_root: str | None = None) -> str | None:
    """Digest of a CLIP, None if that needs a download or a package, or if there is no such CLIP."""
    if weights.startswith(OPEN_CLIP_PREFIX):
        return known_open_clip_digest(weights, download_root)
    try:
        return OpenAIFiles(weights).digest
    except FileNotFoundError:
        return None
