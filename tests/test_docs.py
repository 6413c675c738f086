"""The pages: links, paths, keys and options exist, commands parse, and the marked ones run.

A block of commands marked ``sh demo`` works in the repository's folder after ``make demo``; the
slow test runs it. Pages in docs/lab are dated notes: only their links are looked at.
"""

import ast
import contextlib
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from importlib.util import find_spec
from pathlib import Path

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog

import hierkd.load_config  # noqa: F401  (registers the datasets)
from hierkd.config import add_hierkd_config

ROOT = Path(__file__).resolve().parent.parent
USER = [*sorted(ROOT.glob("docs/*.md")), ROOT / "datasets" / "README.md"]
GUIDE = [ROOT / "README.md", *USER]
PAGES = [*GUIDE, ROOT / "CONTRIBUTING.md", ROOT / "projects" / "HierKD" / "README.md"]
LAB = [*sorted(ROOT.glob("docs/lab/*.md")), ROOT / "CHANGELOG.md"]
SCRIPTS = [ROOT / "train_net.py", ROOT / "demo.py", *ROOT.glob("tools/*.py")]
SCRIPTS += ROOT.glob("datasets/*.py")
# Options of other programs, and of detectron2's parser.
OTHERS = (
    "--no-deps --require-hashes --no-build-isolation --strict --disable-pip --signal --nnodes "
    "--help --config-file --resume --eval-only --num-gpus --num-machines --machine-rank --dist-url"
)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(text: str) -> list[tuple[str, str]]:
    """What is said after the fence, and the text, of each fenced block."""
    found = re.findall(r"^( *)```([^\n]+)\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [(info, re.sub(f"^{indent}", "", body, flags=re.M)) for indent, info, body in found]


def shell(text: str) -> str:
    return "".join(body for info, body in blocks(text) if info.split()[0] in ("sh", "bash"))


def prose(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)


def calls(commands: str) -> list[list[str]]:
    """The words of each call of a script, from the script's name on."""
    found = []
    for line in commands.replace("\\\n", " ").splitlines():
        if re.match(r" *(python|torchrun|srun) ", line):
            words = shlex.split(line, comments=True)
            scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
            found += [words[i:] for i in scripts[:1]]
    return found


class ParsedError(Exception):
    """Raised in the place of what a script does after it has read its command line."""


def parse(script: str, *words: str) -> Namespace:
    """What a script's own parser makes of ``words``; ValueError if it refuses them."""
    original, printed = ArgumentParser.parse_args, io.StringIO()

    def parse_args(self, args=None, namespace=None):
        raise ParsedError(original(self, args, namespace))

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(printed):
        patch.setattr(ArgumentParser, "parse_args", parse_args)
        patch.setattr(ArgumentParser, "parse_intermixed_args", parse_args)
        patch.setattr(sys, "argv", [script, *words])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except ParsedError as parsed:
            return parsed.args[0]
        except SystemExit as end:
            raise ValueError(f"{script}: {printed.getvalue() or end}") from None
    raise ValueError(f"{script} does not read its command line with argparse")


def hierkd_cfg() -> CfgNode:
    cfg = get_cfg()
    add_hierkd_config(cfg)
    return cfg


def check_call(call: list[str]) -> None:
    """A script takes its words, and its config the KEY VALUE pairs among them."""
    options, cfg = parse(*call), hierkd_cfg()
    config = getattr(options, "config_file", None) or ""
    if config.startswith("configs/"):  # others are made on the page
        cfg.merge_from_file(str(ROOT / config))
    cfg.merge_from_list(list(getattr(options, "opts", None) or []))


@pytest.mark.parametrize("page", [*PAGES, *SCRIPTS], ids=name_of)
def test_commands_parse(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = page.read_text()
    usage = ast.get_docstring(ast.parse(text)) if page.suffix == ".py" else shell(text)
    for call in calls(usage or ""):
        written = f"cat > {call[0]} " in text
        if not written and call[0] != "tools/environment.py" and "--help" not in call:
            check_call(call)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *LAB], ids=name_of)
def test_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text())):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not target.startswith("http"):
            assert file.exists(), target
            assert not anchor or anchor in anchors(file.read_text()), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_a_page_names_exists(page):
    """Keys, datasets, options and paths."""
    text, cfg = page.read_text(), hierkd_cfg()
    nodes = "|".join(key for key, value in cfg.items() if isinstance(value, CfgNode))
    for key in re.findall(rf"\b(?:{nodes})(?:\.[A-Z0-9_]+)+\b", text):
        node = cfg
        for part in key.split("."):
            assert part in node, key
            node = node[part]
    for name in re.findall(r"\b(?:coco|miniature)_ovd_\w+", text):
        assert any(dataset.startswith(name) for dataset in DatasetCatalog.list()), name
    sources = [path.read_text() for path in [*SCRIPTS, *ROOT.glob("projects/**/*.py")]]
    for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", prose(text)):
        assert option in OTHERS.split() or f'"{option}"' in "".join(sources), option
    code = "\n".join([*re.findall(r"`([^`]+)`", prose(text)), shell(text)])
    folders = "configs|tools|docs|requirements|projects|tests|datasets"
    for path in re.findall(rf"(?<![\w/.$~-])((?:{folders})/[\w./*-]*)", code):
        made = path.startswith("datasets/miniature")
        assert made or list(ROOT.glob(path.rstrip("./*") + "*")), path


def test_the_guide_is_short_and_holds_no_notebook():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100
    assert len(USER) == 11
    words = re.findall(r"\S*\w\S*", "\n".join(page.read_text() for page in USER))
    assert len(words) <= 11_000
    for page in GUIDE:
        for info, body in blocks(page.read_text()):
            assert re.fullmatch(
                "sh( demo)?|bash|python( export| supervision)?|text|json|nginx|bibtex", info
            ), info
            compile(body if "python" in info else "", name_of(page), "exec")
        hashes = re.findall(r"\b(?=\w*\d)(?=\w*[a-f])[0-9a-f]{7,40}\b", page.read_text())
        assert hashes == [], f"{name_of(page)}: commits stand in docs/lab"


@pytest.mark.slow
def test_the_marked_blocks_run(tmp_path):
    """In a copy of the checkout; trainings are cut short."""
    for entry in [*ROOT.iterdir(), *(ROOT / "datasets").iterdir()]:
        if entry.name not in ("output", ".git", "datasets", "miniature", "coco"):
            link = tmp_path / entry.relative_to(ROOT)
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(entry)
    short = "SOLVER.MAX_ITER 4 SOLVER.WARMUP_ITERS 1 SOLVER.CHECKPOINT_PERIOD 4"
    python = tmp_path / "programs" / "python"
    python.parent.mkdir()
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *--eval-only*) ;; train_net.py*) set -- "$@" {short};; esac\n'
        f'exec "{sys.executable}" "$@"\n'
    )
    python.chmod(0o755)
    environment = {
        **{key: value for key, value in os.environ.items() if key != "DETECTRON2_DATASETS"},
        **{"PATH": f"{python.parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
        **{"PYTHONPATH": f"{ROOT}/projects/HierKD", "HIERKD_CACHE": str(tmp_path / "cache")},
    }

    def run(commands: str) -> None:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands],
            **{"cwd": tmp_path, "env": environment, "timeout": 900, "check": False},
            **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True},
        )
        assert done.returncode == 0, f"{commands}\n{done.stdout[-3000:]}"

    world, demo = ROOT / "datasets" / "miniature", ROOT / "output" / "demo"
    if (world / "teacher.pt").exists() and (demo / "hierkd" / "model_final.pth").exists():
        (tmp_path / "datasets" / "miniature").symlink_to(world)
        shutil.copytree(demo, tmp_path / "output" / "demo")
    else:
        run("python tools/run_demo.py --output output/demo SOLVER.MAX_ITER 40")
    for page in GUIDE:  # custom_data before evaluation, which needs its pictures
        for info, body in blocks(page.read_text()):
            if info == "sh demo" and (page.stem != "python_api" or find_spec("onnxscript")):
                run(body)
