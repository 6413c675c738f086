#!/usr/bin/env python3
"""Put class embeddings, with their provenance, into one file; see README.md beside this one.

    python datasets/extract_text_embeddings.py --names coco_ovd_48_17_val_all \
        --output coco.safetensors
    python datasets/extract_text_embeddings.py --names "cat,traffic cone" --templates ensemble \
        --output mine.safetensors
    python datasets/extract_text_embeddings.py --from made_elsewhere.npy --names names.txt \
        --template "a {}" --output theirs.safetensors --verify 20

``MODEL.TEXT_CLASSIFIER.EMBEDDINGS coco.safetensors`` then uses them, without CLIP's weights.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hierkd
from hierkd.command import run_command

if TYPE_CHECKING:  # PyTorch is imported when the command line has been understood
    from hierkd.teachers.clip import CLIPTeacher
    from hierkd.teachers.texts import TextEmbeddings

logger = logging.getLogger("hierkd.extract_text_embeddings")


def get_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--names",
        nargs="+",
        required=True,
        metavar="SOURCE",
        help="class names: separated by commas, a .txt with one a line, a .json with a list, or "
        "the name of a registered dataset; of several sources all names, each once",
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="the file to write")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--template", help='prompt; "{}" is the name (default: the config\'s)')
    prompts.add_argument(
        "--templates",
        metavar="ensemble|FILE",
        help="several prompts to average: the built-in ones, or a text file with one a line",
    )
    parser.add_argument(
        "--background-prompt", metavar="TEXT", help="stored too (default: the config's)"
    )
    parser.add_argument(
        "--weights", help="CLIP, as MODEL.TEACHER.WEIGHTS names one (default: the config's)"
    )
    parser.add_argument(
        "--config-file", default="", metavar="YAML", help="where the defaults above come from"
    )
    others = parser.add_argument_group("embeddings made elsewhere")
    others.add_argument(
        "--from", dest="array", metavar="FILE", help=".npy, or .pt with one tensor, of shape (K, D)"
    )
    others.add_argument("--embed-dim", type=int, metavar="D", help="expected size of an embedding")
    others.add_argument(
        "--verify",
        type=int,
        default=0,
        metavar="N",
        help="let CLIP encode N of the names and compare: finds a wrong order and another CLIP; "
        "the background prompt is then stored, too",
    )
    others.add_argument(
        "--background-from", metavar="FILE", help="the background's embedding, of shape (D,)"
    )
    others.add_argument(
        "--trust-order",
        action="store_true",
        help="accept COCO's names in another order than that of the category ids",
    )
    return parser


def read_names(sources: Sequence[str], *, keep_repeated: bool) -> list[str]:
    """Read all sources of names; one that is in several counts once, unless kept for an array."""
    from hierkd.inference.predictor import resolve_vocabulary
    from hierkd.teachers.texts import read_text_lines

    names: list[str] = []
    for source in sources:
        is_file = source.endswith((".txt", ".json"))
        names += (
            read_text_lines(source)
            if is_file
            else resolve_vocabulary(source, merge_repeated=False)  # rows may belong to them
        )
    odd = [name for name in names if "_" in name]
    if odd:
        logger.warning("%d names have underscores, e.g. %r: CLIP reads words", len(odd), odd[0])
    return names if keep_repeated else list(dict.fromkeys(names))


def templates_of(args: argparse.Namespace) -> tuple[str, ...]:
    """Templates of the command line, () without any.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: one has not exactly one "{}", or the file is wrong.
    """
    from hierkd.teachers.texts import PROMPT_ENSEMBLE, check_template, read_templates

    if args.template is not None:
        check_template(args.template, "--template")
        return (args.template,)
    if args.templates == "ensemble":
        return PROMPT_ENSEMBLE
    return () if args.templates is None else read_templates(args.templates)


def build_clip(cfg: Any, args: argparse.Namespace, templates: tuple[str, ...]) -> CLIPTeacher:
    """CLIP in single precision, with the command line's choices in place of the config's."""
    from hierkd.teachers.clip import CLIPTeacher

    text = cfg.MODEL.TEXT_CLASSIFIER
    return CLIPTeacher(
        args.weights or cfg.MODEL.TEACHER.WEIGHTS,
        device=cfg.MODEL.DEVICE,
        templates=templates or text.TEMPLATES or (text.TEMPLATE,),
        text_cache_dir=cfg.MODEL.TEACHER.TEXT_CACHE_DIR,
        download_root=cfg.MODEL.TEACHER.DOWNLOAD_ROOT,
        precision="fp32",
    )


def provenance_of(clip: CLIPTeacher | None) -> dict[str, Any]:
    """What a file says about its CLIP; folders of this machine are left out."""
    if clip is None:
        return {"version": hierkd.__version__}
    return {
        "version": hierkd.__version__,
        "clip": clip.title,
        "weights_sha256": clip.weights_digest,
        "templates": clip.templates,
    }


def extract(cfg: Any, args: argparse.Namespace, templates: tuple[str, ...]) -> TextEmbeddings:
    """Let CLIP encode the names and the background prompt."""
    from hierkd.teachers.texts import make_text_embeddings

    names = read_names(args.names, keep_repeated=False)
    clip = build_clip(cfg, args, templates)
    prompt = args.background_prompt or cfg.MODEL.TEXT_CLASSIFIER.BACKGROUND_PROMPT
    return make_text_embeddings(
        names,
        clip.encode_classes(names).cpu().numpy(),
        background=clip.encode_captions([prompt])[0].cpu().numpy(),
        background_prompt=prompt,
        **provenance_of(clip),
    )


def convert(cfg: Any, args: argparse.Namespace, templates: tuple[str, ...]) -> TextEmbeddings:
    """Check an array that somebody else made, and give it names and what is known of it."""
    import numpy as np

    from hierkd.teachers import texts

    names_from = ", ".join(args.names)
    names = read_names(args.names, keep_repeated=True)
    texts.check_names(names, names_from)
    rows, digest = texts.read_embedding_array(args.array)
    texts.check_rows(
        rows, names, rows_from=args.array, names_from=names_from, embed_dim=args.embed_dim
    )
    if not (args.verify or args.trust_order):
        texts.check_known_order(names, coco_orders(), names_from)
    # Nothing is said of the CLIP or the prompts but what the command line says.
    clip = build_clip(cfg, args, templates) if args.verify or args.weights else None
    known = provenance_of(clip)
    if not args.verify:
        known["templates"] = templates
    prompt = args.background_prompt or cfg.MODEL.TEXT_CLASSIFIER.BACKGROUND_PROMPT
    background = None
    if args.background_from:
        background, _ = texts.read_embedding_array(args.background_from)
    elif clip is not None and args.verify:
        background = clip.encode_captions([prompt])[0].cpu().numpy()
    stored = texts.make_text_embeddings(
        names,
        rows,
        background=background,
        rows_from=args.array,
        names_from=names_from,
        background_prompt="" if background is None else prompt,
        source=Path(args.array).name,
        source_sha256=digest,
        verified_rows=min(args.verify, len(names)),
        **known,
    )
    if clip is not None and args.verify:
        chosen = np.random.default_rng(0).permutation(len(names))[: args.verify].tolist()
        expected = clip.encode_classes([names[row] for row in chosen])
        texts.check_same_rows(stored, chosen, expected.cpu().numpy())
    return stored


def coco_orders() -> dict[str, list[str]]:
    """COCO's lists of names, in the order of the category ids."""
    from hierkd.data.splits import COCO_CATEGORIES, SPLITS

    lists = {"COCO's 80 categories": COCO_CATEGORIES}
    for key, split in SPLITS.items():
        for part in ("base", "novel", "all"):
            lists[f"COCO's split {key}, {part}"] = getattr(split, part)
    return {title: [category.name for category in each] for title, each in lists.items()}


def summary(stored: TextEmbeddings, path: str) -> str:
    """One line for the user."""
    clip = f"CLIP {stored.clip} (SHA-256 {stored.weights_sha256[:12]}...)"
    prompts = f"{len(stored.templates)} template(s), first {stored.templates[:1]}"
    background = "no background: that needs CLIP, or --background-from"
    return "; ".join(
        [
            f"{path}: {len(stored.names)} names, D = {stored.embed_dim}",
            clip if stored.weights_sha256 else "CLIP unknown: give --weights",
            prompts if stored.templates else "templates unknown: give --template",
            f"background {stored.background_prompt!r}" if stored.background_prompt else background,
            *([f"{stored.verified_rows} rows verified"] if stored.source else []),
        ]
    )


def run(args: argparse.Namespace) -> TextEmbeddings:
    """Make the file.

    Raises:
        FileNotFoundError: a file of the command line, or CLIP's weights, are not there.
        ValueError: anything else that is wrong with them; the message names it.
    """
    import torch

    from hierkd.load_config import load_config
    from hierkd.teachers.texts import save_text_embeddings

    if not args.output.endswith(".safetensors"):
        raise ValueError(f"--output {args.output}: expected a name that ends in .safetensors")
    conversion_only = ("embed_dim", "verify", "background_from", "trust_order")
    if not args.array and (given := [name for name in conversion_only if getattr(args, name)]):
        raise ValueError(f"--{given[0].replace('_', '-')} goes with --from only")
    if args.verify < 0:
        raise ValueError(f"--verify: expected a number of rows, found {args.verify}")
    device = () if torch.cuda.is_available() else ("MODEL.DEVICE", "cpu")
    cfg = load_config(args.config_file, device)
    templates = templates_of(args)
    stored = convert(cfg, args, templates) if args.array else extract(cfg, args, templates)
    save_text_embeddings(stored, args.output)
    return stored


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    args = get_parser().parse_args(arguments)

    from detectron2.utils.logger import setup_logger

    setup_logger(name="hierkd", abbrev_name="hierkd")
    try:
        stored = run(args)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(summary(stored, args.output))
    return 0


if __name__ == "__main__":
    run_command(main)
