"""The teacher: a frozen CLIP that embeds image regions and texts (paper §3.2, §3.3).

The detector sees the `Teacher` protocol and knows nothing of CLIP's colour order, pixel range,
normalisation, input size and tokeniser; `openai_clip` and `open_clip_models` know the two packages
that CLIPs come from.  A teacher is a plain object, not an ``nn.Module``: ``state_dict``,
``model.train()``, the optimiser and DDP cannot see it.

CLIP is loaded on the first call that really needs it.  Text embeddings are kept on disk, so that
evaluation and inference with known texts never load it; with a file of class embeddings
(``MODEL.TEXT_CLASSIFIER.EMBEDDINGS``) they do without CLIP's weights altogether.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from hierkd.files import cache_root
from hierkd.teachers.clip_model import CLIPFiles, LoadedCLIP, TokenCounter
from hierkd.teachers.crops import crop_regions
from hierkd.teachers.frozen_encoder import make_batch
from hierkd.teachers.open_clip_models import (
    OPEN_CLIP_PREFIX,
    OpenCLIPFiles,
    known_open_clip_digest,
    open_clip_token_counter,
)
from hierkd.teachers.openai_clip import (
    CLIP_MEAN,
    CLIP_STD,
    OPENAI_TOKENS,
    OpenAIFiles,
    import_clip,
    known_openai_digest,
)
from hierkd.teachers.text_cache import TextCache, Vector
from hierkd.teachers.texts import (
    TextEmbeddings,
    check_provenance,
    check_template,
    load_text_embeddings,
)

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "OPENAI_TOKENS",
    "CLIPTeacher",
    "StoredTextTeacher",
    "Teacher",
    "build_teacher",
    "check_embed_dim",
    "encode_prompts",
    "find_clip",
    "find_token_counter",
    "import_clip",
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
# Text embeddings held in memory; the least recently used goes first. [ours] 128 MB at D = 512.
_TEXTS_IN_MEMORY = 65_536
# Characters of a text that reach CLIP's tokeniser, white space collapsed. [ours] CLIP reads 75
# tokens, some 300 characters; the tokeniser's time grows with the square of the length of a word,
# and one of 100,000 letters would take minutes.
_TEXT_LENGTH = 2000


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
    """A frozen CLIP, OpenAI's or open_clip's; implements `Teacher`.

    Args:
        weights: see `find_clip`.
        device: where CLIP runs and where embeddings are returned.
        image_format: order of the channels of the images, "RGB" or "BGR".
        template: prompt with one "{}" for the class name.
        templates: several of them, in place of `template`: a prompt ensemble.
        text_cache_dir: folder of the text cache; None or "" means
            ``$HIERKD_CACHE/text_embeddings``, where that variable defaults to ``~/.cache/hierkd``.
        download_root: folder of downloaded models; None or "" means the package's own.
        precision: "fp16", "fp32", or "auto": half precision on a GPU, single on a CPU.
        pixel_statistics: mean and deviation of the pixels, "clip" (the model's own) or "imagenet".

    Raises:
        ValueError: unknown `image_format`, `precision` or `pixel_statistics`, or a template without
            exactly one "{}".
        FileNotFoundError: `weights` names nothing that is known or exists.
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
        self.pixel_statistics = pixel_statistics
        self.templates = tuple(templates) or (template,)
        self.half = self.device.type == "cuda" if precision == "auto" else precision == "fp16"
        self._files = find_clip(weights, download_root)
        self._loaded: LoadedCLIP | None = None
        self._memory: OrderedDict[str, Vector] = OrderedDict()
        if text_cache_dir:
            folder = Path(text_cache_dir).expanduser()
        else:
            folder = cache_root() / "text_embeddings"
        self._disk = TextCache(folder / f"clip-{self.weights_digest[:32]}.sqlite")

    def __repr__(self) -> str:
        return f"CLIPTeacher(weights={self.weights!r}, device={str(self.device)!r})"

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
        """D; of a published model it is known, else the text cache or the loaded model tells."""
        if self._loaded is None and self._files.embed_dim is not None:
            return self._files.embed_dim
        if self._loaded is None and (cached := self._disk.properties()) is not None:
            return cached[0]
        return self._clip().embed_dim

    @property
    def logit_scale(self) -> float:
        """CLIP's exp(logit_scale), 100 for OpenAI's; from the text cache or the loaded model."""
        if self._loaded is None and (cached := self._disk.properties()) is not None:
            return cached[1]
        return self._clip().logit_scale

    @property
    def loaded(self) -> bool:
        """Whether CLIP itself has been loaded."""
        return self._loaded is not None

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
        clip = self._clip()
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
        )
        multiple = _REGIONS_MULTIPLE if self.device.type == "cuda" else 1
        # The student's mixed precision must not reach into the teacher.
        with torch.autocast(self.device.type, enabled=False):
            embeddings: Tensor = clip.model.encode_image(make_batch(crops, clip.dtype, multiple))
        return F.normalize(embeddings[: len(crops)].float(), dim=-1)

    def _lookup(self, texts: Sequence[str]) -> dict[str, Vector]:
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
    def _encode_texts(self, texts: Sequence[str]) -> dict[str, Vector]:
        clip = self._clip()
        rows: dict[str, Vector] = {}
        with tqdm(
            total=len(texts),
            desc="Encoding texts with CLIP",
            unit="text",
            disable=len(texts) <= _TEXTS_WITHOUT_PROGRESS,
        ) as progress:
            for start in range(0, len(texts), _TEXTS_PER_CALL):
                chunk = list(texts[start : start + _TEXTS_PER_CALL])
                tokens = clip.tokenize([_beginning(text) for text in chunk])
                with torch.autocast(self.device.type, enabled=False):
                    embeddings = clip.model.encode_text(tokens.to(self.device))
                normalised = F.normalize(embeddings.float(), dim=-1).cpu().numpy()
                # copies: as a view, one row in use would hold all the others of its chunk
                new = {text: row.copy() for text, row in zip(chunk, normalised, strict=True)}
                # Written per chunk: what was encoded before an interruption is not lost.
                self._disk.write(new, self.embed_dim, self.logit_scale)
                rows |= new
                progress.update(len(chunk))
        return rows

    def _clip(self) -> LoadedCLIP:
        """CLIP, loaded on the first call."""
        if self._loaded is None:
            logger.info("Loading CLIP %s", self.weights)
            # Building draws initial values that are then overwritten: the run's random numbers must
            # not depend on whether the cache had the answer.  Parameters made inside inference mode
            # could not be used outside of it.
            with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
                loaded = self._files.load(self.device, self.half)
                loaded.model.visual.to(memory_format=torch.channels_last)
            self._check_templates(loaded)
            self._loaded = loaded
        return self._loaded

    def _check_templates(self, clip: LoadedCLIP) -> None:
        """Raise ValueError if a template is so long that the class name is cut off."""
        for template in self.templates:
            cat, dog = clip.tokenize([_beginning(template.format(name)) for name in ("cat", "dog")])
            if torch.equal(cat, dog):
                raise ValueError(
                    f"MODEL.TEXT_CLASSIFIER.TEMPLATES (or TEMPLATE): {template!r} is too long: "
                    f"the text encoder of {self.title!r} reads {clip.context_length} tokens, which "
                    "end before the class name"
                )


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
    MODEL.TEXT_CLASSIFIER.{TEMPLATE, TEMPLATES, TEMPLATES_FILE, EMBEDDINGS, EMBED_DIM}, MODEL.DEVICE
    and INPUT.FORMAT.

    Raises:
        FileNotFoundError: EMBEDDINGS names no file, or, where CLIP is needed, WEIGHTS.
        ValueError: a wrong template, or the file of EMBEDDINGS is broken, of another size than
            EMBED_DIM, or made with another CLIP or other templates.
    """
    text = cfg.MODEL.TEXT_CLASSIFIER
    if text.TEMPLATES_FILE:
        raise ValueError(
            "MODEL.TEXT_CLASSIFIER.TEMPLATES_FILE is not read yet: read the config with "
            "hierkd.load_config.load_config, which puts its templates into TEMPLATES"
        )

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
            f"MODEL.TEXT_CLASSIFIER.EMBED_DIM is {text.EMBED_DIM}: they are of another CLIP; set "
            f'MODEL.TEXT_CLASSIFIER.EMBEDDINGS to a file of the detector\'s, or to ""'
        )
    weights = cfg.MODEL.TEACHER.WEIGHTS
    unknown = check_provenance(
        stored,
        weights=weights,
        weights_sha256=known_weights_sha256(weights, cfg.MODEL.TEACHER.DOWNLOAD_ROOT),
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


def find_clip(weights: str, download_root: str | None = None) -> CLIPFiles:
    """Find the files of a CLIP.

    Args:
        weights: MODEL.TEACHER.WEIGHTS: a name or file of OpenAI's CLIP (see `OpenAIFiles`), or
            "open_clip:..." (see `OpenCLIPFiles`).
        download_root: folder of downloaded models; None or "" means the package's own.

    Raises:
        FileNotFoundError: there is no such model or file.
    """
    if weights.startswith(OPEN_CLIP_PREFIX):
        return OpenCLIPFiles(weights, download_root)
    return OpenAIFiles(weights, download_root)


def known_weights_sha256(weights: str, download_root: str | None = None) -> str | None:
    """`CLIPFiles.digest` of a CLIP, None if that needs a download, or a package, or is unknown."""
    if weights.startswith(OPEN_CLIP_PREFIX):
        return known_open_clip_digest(weights, download_root)
    return known_openai_digest(weights)


def find_token_counter(weights: str, download_root: str | None = None) -> TokenCounter:
    """The tokeniser of a CLIP, without its weights.

    Args:
        weights: MODEL.TEACHER.WEIGHTS, see `find_clip`.
        download_root: likewise.

    Raises:
        FileNotFoundError: there is no such model of open_clip, or its tokeniser cannot be made.
        ValueError: `weights`, or the config of the folder it names, is wrong.
    """
    if weights.startswith(OPEN_CLIP_PREFIX):
        return open_clip_token_counter(weights, download_root)
    return OPENAI_TOKENS


def _check_sequence_of_names(names: Sequence[str]) -> None:
    if isinstance(names, str):
        raise ValueError(f"expected a sequence of class names, found the single name {names!r}")


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


def _beginning(text: str) -> str:
    """As much of a text as can matter to CLIP; one of ordinary length is left as it is."""
    if len(text) <= _TEXT_LENGTH:
        return text
    return " ".join(text.split())[:_TEXT_LENGTH]
