#!/usr/bin/env python3
"""Put class embeddings, with their provenance, into one file; see README.md beside this one.

    python datasets/extract_text_embeddings.py --names coco_ovd_48_17_val_all \
        --output coco.safetensors
    python datasets/extract_text_embeddings.py --names "cat,traffic cone" \
        --templates datasets/prompts/ensemble.txt --output mine.safetensors

``MODEL.TEXT_CLASSIFIER.EMBEDDINGS coco.safetensors`` then uses them, without CLIP's weights.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hierkd.command import one_line_errors, run_command

if TYPE_CHECKING:  # PyTorch is imported when the command line has been understood
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
        metavar="FILE",
        help="several prompts to average: a text file with one a line",
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
    return parser


def read_names(sources: Sequence[str]) -> list[str]:
    """Read all sources of names; one that is in several counts once."""
    from hierkd.inference.predictor import resolve_vocabulary
    from hierkd.teachers.texts import read_text_lines

    names: list[str] = []
    for source in sources:
        is_file = source.endswith((".txt", ".json"))
        names += (
            read_text_lines(source)
            if is_file
            else resolve_vocabulary(source, merge_repeated=False)  # a file refuses them
        )
    odd = [name for name in names if "_" in name]
    if odd:
        logger.warning("%d names have underscores, e.g. %r: CLIP reads words", len(odd), odd[0])
    return list(dict.fromkeys(names))


def templates_of(args: argparse.Namespace) -> tuple[str, ...]:
    """Templates of the command line, () without any.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: one has not exactly one "{}", or the file is wrong.
    """
    from hierkd.teachers.texts import check_template, read_templates

    if args.template is not None:
        check_template(args.template, "--template")
        return (args.template,)
    return () if args.templates is None else read_templates(args.templates)


def run(args: argparse.Namespace) -> TextEmbeddings:
    """Let CLIP, in single precision, encode the names and the background prompt.

    Raises:
        FileNotFoundError: a file of the command line, or CLIP's weights, are not there.
        ValueError: anything else that is wrong with them; the message names it.
    """
    import torch

    from hierkd.load_config import load_config
    from hierkd.teachers.clip import CLIPTeacher
    from hierkd.teachers.texts import save_text_embeddings

    if not args.output.endswith(".safetensors"):
        raise ValueError(f"--output {args.output}: expected a name that ends in .safetensors")
    device = () if torch.cuda.is_available() else ("MODEL.DEVICE", "cpu")
    cfg = load_config(args.config_file, device)
    text, teacher = cfg.MODEL.TEXT_CLASSIFIER, cfg.MODEL.TEACHER
    templates = templates_of(args) or text.TEMPLATES or (text.TEMPLATE,)
    names = read_names(args.names)
    clip = CLIPTeacher(
        args.weights or teacher.WEIGHTS,
        device=cfg.MODEL.DEVICE,
        templates=templates,
        text_cache_dir=teacher.TEXT_CACHE_DIR,
        download_root=teacher.DOWNLOAD_ROOT,
        precision="fp32",
    )
    prompt = args.background_prompt or text.BACKGROUND_PROMPT
    stored = clip.text_embeddings(names, prompt)
    save_text_embeddings(stored, args.output)
    return stored


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = get_parser().parse_args(arguments)

    from detectron2.utils.logger import setup_logger

    setup_logger(name="hierkd", abbrev_name="hierkd")
    stored = run(args)
    print(
        f"{args.output}: {len(stored.names)} names, D = {stored.embed_dim}; CLIP {stored.clip} "
        f"(SHA-256 {stored.weights_sha256[:12]}...); {len(stored.templates)} template(s), first "
        f"{stored.templates[:1]}; background {stored.background_prompt!r}"
    )


if __name__ == "__main__":
    run_command(main)
