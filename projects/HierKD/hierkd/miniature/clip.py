"""A tiny CLIP for the miniature, trained in minutes and saved in OpenAI's format.

It plays the part of OpenAI's CLIP: it has seen pictures of every class, base and novel, with text,
and knows nothing of boxes in the detector's training set. Its pictures are rendered with another
seed than the detector's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from hierkd.files import replacing
from hierkd.miniature.world import MINIATURE_CLASSES, MiniatureSpec, make_captions, render_scene
from hierkd.teachers.crops import crop_regions
from hierkd.teachers.openai_clip import CLIP_MEAN, CLIP_STD, import_clip

__all__ = ["TinyCLIPSpec", "build_tiny_clip", "save_clip", "train_tiny_clip"]

_PROMPTS = ("a photo of a {}.", "a photo of a {}.", "a picture of a {}.", "a {}.")


@dataclass(frozen=True)
class TinyCLIPSpec:
    """Size and training of the tiny CLIP. The figures were found by measurement. [ours]"""

    embed_dim: int = 64
    resolution: int = 64  # px; ModifiedResNet needs a multiple of 32
    vision_layers: tuple[int, int, int, int] = (1, 1, 1, 1)
    vision_width: int = 12  # a wider one learns less in these steps
    context_length: int = 32  # tokens
    text_width: int = 64
    text_layers: int = 2
    seed: int = 1234
    scenes: int = 2000
    steps: int = 450
    batch_size: int = 128
    lr: float = 3e-3
    windows_from: float = 0.3  # fraction of the steps after which a third are whole pictures


def build_tiny_clip(spec: TinyCLIPSpec) -> Any:
    """A randomly initialised ``clip.model.CLIP``, in float32."""
    clip = import_clip()
    return clip.model.CLIP(
        spec.embed_dim,
        spec.resolution,
        spec.vision_layers,
        spec.vision_width,
        None,
        spec.context_length,
        len(clip.clip._tokenizer.encoder),
        spec.text_width,
        max(1, spec.text_width // 64),
        spec.text_layers,
    ).float()


class _Samples:
    """Batches of normalised crops with the text and the classes of each."""

    def __init__(self, spec: TinyCLIPSpec, world: MiniatureSpec) -> None:
        self._spec = spec
        self._rng = np.random.default_rng((spec.seed, 1))
        self._named = world.named_probability
        self._scenes = []
        for index in tqdm(range(spec.scenes), desc="rendering for CLIP", unit="picture"):
            rng = np.random.default_rng((spec.seed, 0, index))
            number = rng.integers(world.min_objects, world.max_objects + 1)
            names = [str(name) for name in rng.choice(MINIATURE_CLASSES, number)]
            self._scenes.append(render_scene(names, world, rng))
        self._pictures = [
            torch.from_numpy(scene.picture).permute(2, 0, 1).contiguous() for scene in self._scenes
        ]

    def draw(self, windows: float) -> tuple[Tensor, list[str], Tensor]:
        """Crops (B, 3, S, S), captions (B,), multi-hot classes named by the caption (B, 32).

        ``windows`` is the share of whole pictures; the others are crops around one object.
        """
        images, boxes, texts = [], [], []
        for index in self._rng.integers(0, len(self._scenes), self._spec.batch_size):
            scene = self._scenes[index]
            size = scene.picture.shape[0]
            images.append(self._pictures[index])
            if self._rng.random() < windows:
                boxes.append(torch.tensor([[0.0, 0.0, size, size]]))
                texts.append(make_captions(scene.names, 1, self._named, self._rng)[0])
            else:
                chosen = self._rng.integers(len(scene.names))
                boxes.append(self._jitter(scene.boxes[chosen]))
                prompt = _PROMPTS[self._rng.integers(len(_PROMPTS))]
                texts.append(prompt.format(scene.names[chosen]))
        crops = crop_regions(
            images,
            boxes,
            size=self._spec.resolution,
            scale=1.0,
            mean=[255 * v for v in CLIP_MEAN],
            std=[255 * v for v in CLIP_STD],
        )
        flip = torch.from_numpy(self._rng.random(len(crops)) < 0.5)
        crops[flip] = crops[flip].flip(3)
        return crops, texts, torch.stack([_named_classes(text) for text in texts])

    def _jitter(self, box: Any) -> Tensor:
        """A box with context: 1 to 2 times as large, a little off its place."""
        x0, y0, x1, y1 = box
        width, height = x1 - x0, y1 - y0
        scale = self._rng.uniform(1.0, 2.0)
        dx, dy = self._rng.uniform(-0.08, 0.08, 2) * (width, height)
        cx, cy = (x0 + x1) / 2 + dx, (y0 + y1) / 2 + dy
        half = torch.tensor([width, height]) * scale / 2
        center = torch.tensor([cx, cy])
        return torch.cat([center - half, center + half])[None].float()


def _named_classes(text: str) -> Tensor:
    """Multi-hot vector of the classes that a caption names."""
    words = set(text.replace(",", " ").replace(".", " ").split())
    return torch.tensor([float(name in words) for name in MINIATURE_CLASSES])


def _encode_texts(model: Any, texts: Sequence[str]) -> Tensor:
    """Embed texts, each distinct one once."""
    unique = list(dict.fromkeys(texts))
    tokens = import_clip().tokenize(unique, context_length=model.context_length, truncate=True)
    embeddings: Tensor = model.encode_text(tokens)
    return embeddings[torch.tensor([unique.index(text) for text in texts])]


def train_tiny_clip(
    path: str | os.PathLike[str],
    spec: TinyCLIPSpec,
    world: MiniatureSpec,
) -> dict[str, float]:
    """Train the tiny CLIP and save it as a state dict that ``clip.load(path)`` reads.

    Plain InfoNCE fails on a world of 32 classes, because most batches hold several pictures of one
    class: captions that name the same classes count as positives together, and a classifier shared
    by both towers, dropped afterwards, pulls the text embeddings apart.

    Pictures look as those of ``world``, whose seed and numbers of pictures are not used.

    Returns:
        ``seconds``, ``accuracy`` (of the last tenth of training, images among the captions' class
        sets of the batch) and ``logit_scale``.
    """
    started = time.monotonic()
    samples = _Samples(spec, world)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model = build_tiny_clip(spec).train()
        classifier = nn.Linear(spec.embed_dim, len(MINIATURE_CLASSES))
    model.visual.to(memory_format=torch.channels_last)
    parameters = [*model.parameters(), *classifier.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=spec.lr, weight_decay=0.02, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=spec.lr, total_steps=spec.steps, pct_start=0.1
    )
    accuracies: list[float] = []
    progress = tqdm(range(spec.steps), desc="training the tiny CLIP", unit="step")
    for step in progress:
        windows = 1 / 3 if step >= spec.windows_from * spec.steps else 0.0
        crops, texts, classes = samples.draw(windows)
        image = model.encode_image(crops.contiguous(memory_format=torch.channels_last))
        text = _encode_texts(model, texts)
        image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
        same = (classes[:, None] == classes[None]).all(dim=2).float()
        logits = model.logit_scale.exp() * image @ text.T
        # Symmetric InfoNCE; pairs that name the same classes are positives together.
        targets = same / same.sum(dim=1, keepdim=True)
        loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
        for embedding in (image, text):
            named = 10 * classifier(embedding) - 3
            entropy = F.binary_cross_entropy_with_logits(named, classes, reduction="none")
            loss = loss + entropy.sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        hits = same.gather(1, logits.argmax(dim=1, keepdim=True))
        accuracies.append(float(hits.mean()))
        progress.set_postfix(accuracy=f"{np.mean(accuracies[-20:]):.2f}", refresh=False)
    save_clip(model, path)
    last = accuracies[-max(1, spec.steps // 10) :]
    return {
        "seconds": time.monotonic() - started,
        "accuracy": sum(last) / len(last),
        "logit_scale": float(model.logit_scale.detach().exp()),
    }


def save_clip(model: Any, path: str | os.PathLike[str]) -> None:
    """Save a ``clip.model.CLIP`` as OpenAI's half-precision state dict, whole or not at all."""
    import_clip().model.convert_weights(model)
    # convert_weights leaves the token table in float32, three quarters of a small model
    state = {
        key: value.half() if key == "token_embedding.weight" else value
        for key, value in model.state_dict().items()
    }
    with replacing(path) as making:
        torch.save(state, making)
