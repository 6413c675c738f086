"""Every command, link, key, path and number in the pages is looked at; nothing is run.

What the pages' commands do is tested by ``test_docs_run.py``.
"""

import ast
import contextlib
import io
import itertools
import json
import os
import re
import runpy
import sys
import tomllib
import types
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from docs_pages import (
    LANGUAGES,
    PAGES,
    ROOT,
    SCRIPTS,
    SHELL,
    Command,
    anchors,
    commands_of,
    fenced_blocks,
    inline_code,
    links,
    name_of,
    read_shell,
    usage_lines,
    without_blocks,
)

import hierkd  # noqa: F401  (registers the datasets)
from hierkd.config import add_hierkd_config
from hierkd.load_config import requested_device

# What a command may be besides `python SCRIPT`, `torchrun` and `make`, which are looked into.
# Nothing of these can be wrong but what is checked below.
KNOWN_PROGRAMS = {
    *("cat", "curl", "echo", "export", "head", "ln", "mkdir", "scontrol", "["),
}
# Files that stand for the reader's own. Everything else has to exist or be made on some page.
PLACEHOLDERS = {"street.jpg", "trip.mp4", "photos/", "photos/*.jpg", "names.txt", "model.pth"}
# Datasets of `DATASETS.DEFINITIONS` are called after the YAML's `name`.
DEFINED = re.compile(r"^name: (\S+)$", re.MULTILINE)
PARTS = ("train_base", "val_base", "val_novel", "val_all")
# What `make demo` leaves.
DEMO = {
    *("output/demo", "output/demo/hierkd", "output/demo/report.html", "output/demo/results.json"),
    *(f"output/demo/hierkd/{name}" for name in ("model_final.pth", "config.yaml")),
}
PROSE = [page for page in PAGES if page.name != "CHANGELOG.md"]


class ParsedError(Exception):
    """Raised in the place of what a script does after it has read its command line."""

    def __init__(self, options: Namespace) -> None:
        self.options = options


def parse(script: Path, words: tuple[str, ...]) -> Namespace:
    """What a script's own parser makes of ``words``; the script goes no further.

    Raises:
        ValueError: the parser refuses them; with its message.
    """
    originals = ArgumentParser.parse_args, ArgumentParser.parse_intermixed_args

    def stop_after(original):
        def parse_args(self, args=None, namespace=None):
            raise ParsedError(original(self, args, namespace))

        return parse_args

    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(printed):
        for original in originals:
            patch.setattr(ArgumentParser, original.__name__, stop_after(original))
        patch.setattr(sys, "argv", [str(script), *words])
        for extra in ("onnxruntime", "gradio"):
            if find_spec(extra) is None:  # not installed by `make`; not needed for the options
                patch.setitem(sys.modules, extra, types.ModuleType(extra))
        try:
            runpy.run_path(str(script), run_name="__main__")
        except ParsedError as parsed:
            return parsed.options
        except SystemExit as end:
            raise ValueError(f"{script.name}: {printed.getvalue() or end}") from None
    raise ValueError(f"{script.name} does not read its command line with argparse")


def make_cfg() -> CfgNode:
    cfg = get_cfg()
    add_hierkd_config(cfg)
    return cfg


@pytest.fixture(scope="module")
def written() -> dict[str, str]:
    """Name -> text of the files that the pages write."""
    files: dict[str, str] = {}
    for page in PAGES:
        for command in commands_of(page):
            if command.heredoc is not None and command.writes:
                text = files.setdefault(command.writes, command.heredoc)
                assert text == command.heredoc, f"{name_of(page)}: another {command.writes}"
    return files


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, written) -> Iterator[Path]:
    """A folder with the repository's files and those that the pages write; the working one."""
    root = tmp_path_factory.mktemp("checkout")
    for entry in ROOT.iterdir():
        if entry.name not in ("output", ".git"):
            (root / entry.name).symlink_to(entry)
    for name, text in written.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    demo = root / "output" / "demo" / "hierkd"
    demo.mkdir(parents=True)
    (demo / "config.yaml").write_text(f"_BASE_: {ROOT}/configs/miniature/hierkd.yaml\n")
    before = Path.cwd()
    os.chdir(root)
    yield root
    os.chdir(before)


@pytest.fixture(scope="module")
def produced(written) -> set[str]:
    """What lies below ``output/`` after some command of the pages."""
    found = {*DEMO, "output/detections", "output/reproduce", "output/benchmark"}
    found |= set(written)
    for config in (ROOT / "configs").rglob("*.yaml"):
        found |= set(re.findall(r"^OUTPUT_DIR: (\S+)", config.read_text(), re.MULTILINE))
    for text in written.values():
        found |= set(re.findall(r"""["\s](output/[\w/]+)""", text))
    for page in PAGES:
        found |= set(re.findall(r"""(?:save|Path)\(["'](output/[^"']+)""", page.read_text()))
    for path in (*PAGES, *SCRIPTS):
        for command in commands_of(path):
            for flag, value in itertools.pairwise(command.words):
                if flag in ("--output", "OUTPUT_DIR"):
                    found.add(value)
    return found


# ---------------------------------------------------------------------------------------- commands


def check_command(command: Command, checkout: Path, written: dict[str, str]) -> None:
    """Raise ValueError if a command cannot be right, or is of a program that is not known."""
    program, *arguments = command.words
    if program == "srun":
        program, *arguments = itertools.dropwhile(lambda word: word[0] == "-", arguments)
    if program == "python":
        check_python(arguments, checkout, written)
    elif program == "torchrun":
        check_torchrun(arguments, checkout, written)
    elif program == "make":
        check_make(arguments)
    elif program == "pip":
        check_pip(arguments)
    elif program == "pytest":
        check_pytest(arguments)
    elif program == "source":
        if arguments != [".venv/bin/activate"]:
            raise ValueError(f"no file {arguments[-1]}")
    elif program not in KNOWN_PROGRAMS:
        raise ValueError(f"{program} is a program that this test does not know")
    if command.heredoc is not None:
        check_file(command.writes, command.heredoc)
    elif program == "echo" and arguments[0].startswith("{"):
        json.loads(arguments[0])


def check_python(arguments: list[str], checkout: Path, written: dict[str, str]) -> None:
    if arguments[0] == "-c":
        compile(arguments[1], "-c", "exec")
        return
    if arguments[0] == "-m":
        if find_spec(arguments[1].split(".")[0]) is None:
            raise ValueError(f"no module {arguments[1]}")
        if arguments[1] == "pip":
            check_pip(arguments[2:])
        return
    script, *words = arguments
    if script in written:
        if words:
            raise ValueError(f"{script} takes no arguments")
        return
    if not (checkout / script).is_file():
        raise ValueError(f"no script {script}")
    if script == "tools/environment.py":  # two words, no parser
        if words not in (["check"], ["install"]):
            raise ValueError(f"{script} {words}")
        return
    if words == ["--help"]:
        return
    options = parse(checkout / script, tuple(words))
    check_options(options, checkout, written)


def check_torchrun(arguments: list[str], checkout: Path, written: dict[str, str]) -> None:
    from torch.distributed.run import get_args_parser

    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        try:
            options = get_args_parser().parse_args(arguments)
        except SystemExit:
            raise ValueError(f"torchrun: {printed.getvalue()}") from None
    check_python([options.training_script, *options.training_script_args], checkout, written)


def check_options(options: Namespace, checkout: Path, written: dict[str, str]) -> None:
    """Configs exist and take the KEY VALUE pairs; the datasets that they name are registered."""
    config = getattr(options, "config_file", None) or ""
    pairs = list(getattr(options, "opts", None) or [])
    if config and not (checkout / config).is_file():
        raise ValueError(f"no config {config}")
    if not config and not pairs:
        return
    requested_device(config, pairs)  # raises for unknown keys and wrong types
    cfg = make_cfg()
    if config:
        cfg.merge_from_file(config)
    cfg.merge_from_list(pairs)
    own = {
        f"{name}_{part}"
        for definition in cfg.DATASETS.DEFINITIONS
        for name in DEFINED.findall(written.get(definition, ""))
        for part in PARTS
    }
    for dataset in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        if dataset not in own and dataset not in DatasetCatalog.list():
            raise ValueError(f"no dataset {dataset}")


def make_targets() -> dict[str, str]:
    lines = (ROOT / "Makefile").read_text()
    return dict(re.findall(r"^([a-z][a-z-]*):(.*)$", lines, re.MULTILINE))


def check_make(arguments: list[str]) -> None:
    variables = re.findall(r"^([A-Z_]+)\s*\?=", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for word in arguments:
        name, equals, _ = word.partition("=")
        if equals and name not in variables:
            raise ValueError(f"the Makefile has no variable {name}")
        if not equals and word not in make_targets():
            raise ValueError(f"the Makefile has no target {word}")


def check_pip(arguments: list[str]) -> None:
    """Requirement files, extras and ranges are those of the project."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    allowed = {"install", "download", "wheel", "uninstall", "freeze", "check"}
    if arguments[0] not in allowed:
        raise ValueError(f"pip {arguments[0]}")
    for flag, value in itertools.pairwise(arguments):
        if flag == "-r" and not (ROOT / value).is_file():
            raise ValueError(f"no file {value}")
    for word in arguments:
        match = re.fullmatch(r"(?:\.|hierkd|\S*HierKD)\[([\w,]+)\]", word)
        for extra in match[1].split(",") if match else ():
            if extra not in project["optional-dependencies"]:
                raise ValueError(f"pyproject.toml has no extra {extra}")
        if re.match(r"hierkd\b", word):
            raise ValueError(f"{word}: this project is not on PyPI")
        if "<" in word or ">" in word:
            declared = [
                *project["dependencies"],
                *itertools.chain(*project["optional-dependencies"].values()),
            ]
            if word not in declared:
                raise ValueError(f"{word} is not in pyproject.toml")


def check_pytest(arguments: list[str]) -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    markers = {line.split(":")[0] for line in options["markers"]}
    if arguments[0] != "-m" or arguments[1] not in markers:
        raise ValueError(f"pytest {arguments}")


def check_file(name: str | None, text: str) -> None:
    if name is None:
        raise ValueError("a heredoc that is written nowhere")
    suffix = Path(name).suffix
    if suffix == ".py":
        compile(text, name, "exec")
    elif suffix == ".yaml":
        yaml.safe_load(text)
    elif suffix == ".json":
        json.loads(text)
    elif suffix == ".txt":
        if not text.strip():
            raise ValueError(f"{name} is empty")
    else:
        raise ValueError(f"{name}: a kind of file that this test does not know")


@pytest.mark.parametrize("path", [*PAGES, *SCRIPTS], ids=name_of)
def test_commands(path, checkout, written):
    wrong = []
    for command in commands_of(path):
        try:
            check_command(command, checkout, written)
        except (ValueError, SyntaxError, yaml.YAMLError) as error:
            wrong.append(f"{command}: {error}")
    assert wrong == []


@pytest.mark.parametrize("page", PROSE, ids=name_of)
def test_commands_in_the_prose(page, checkout, written):
    wrong = []
    for line, code in inline_code(page.read_text()):
        if not re.match(
            r"(python|torchrun|make|pip|pytest|demo\.py|train_net\.py|tools/\w+\.py) .", code
        ):
            continue
        code = re.sub(r" (\.\.\.|YAML\b.*)$", "", code)
        if re.match(r"\S+\.py ", code):
            code = f"python {code}"
        for command in read_shell(code, line):
            if "..." in "".join(command.words):
                continue
            try:
                check_command(command, checkout, written)
            except ValueError as error:
                if not is_abridged(command, str(error)):
                    wrong.append(f"{command}: {error}")
    assert wrong == []


def is_abridged(command: Command, error: str) -> bool:
    """Whether a command of the prose lacks nothing but arguments, as in `demo.py --top-k N`."""
    if not re.search(r"are required:|expected (one|at least one) argument|: '[A-Z_]+'", error):
        return False
    source = (ROOT / command.words[1]).read_text()
    options = [word for word in command.words if word.startswith("--")]
    return all(f'"{option}"' in source for option in options)


def test_scripts_say_how_they_are_used():
    silent = [name_of(path) for path in SCRIPTS if not commands_of(path)]
    assert silent == ["tools/environment.py"]  # which `make` calls


WRONG = {
    "pyhton train_net.py": "pyhton is a program that this test does not know",
    "python tools/exprot.py": "no script",
    "python demo.py --inptu x.jpg": "unrecognized arguments",
    "python demo.py --input x.jpg --no-such-option": "unrecognized arguments",
    "python train_net.py --config-file configs/none.yaml": "no config",
    "python train_net.py --config-file configs/hierkd_R50.yaml MODEL.IKD.BOXS gt": "BOXS",
    "python train_net.py --config-file configs/hierkd_R50.yaml SEED x": "SEED",
    "python train_net.py DATASETS.TEST '(\"coco_2017\",)'": "no dataset coco_2017",
    "python tools/benchmark.py inference": "invalid choice",
    "torchrun --no-such-option train_net.py": "torchrun: usage",
    "torchrun --standalone train_net.py --num-gpus x": "invalid int value",
    "make demos": "no target",
    "make demo PYTHONS=x": "no variable",
    "pip install -e '.[onnx]'": "no extra onnx",
    "pip install 'hierkd[export]'": "not on PyPI",
    "pip install -r requirements/none.txt": "no file",
    "pip install 'setuptools<80'": "not in pyproject.toml",
    "cat > x.yaml <<'EOF'\na: [\nEOF": "expected the node content",
    "cat > x.py <<'EOF'\na = [\nEOF": "never closed",
    "cat > x.bin <<'EOF'\na\nEOF": "does not know",
    "srun --gres=gpu:4 nothing": "nothing is a program",
    "for x in y": "for is a program",
    "first=$(nowhere x) && echo $first": "nowhere is a program",
}


@pytest.mark.parametrize("text", WRONG)
def test_the_check_of_commands_can_fail(text, checkout, written):
    def check():
        for command in read_shell(text):
            check_command(command, checkout, written)

    with pytest.raises((ValueError, SyntaxError, yaml.YAMLError), match=WRONG[text]):
        check()


def test_the_shell_is_read_as_a_shell_does():
    text = (
        "a 'b c' \\\n  d  # e\nX=1 f > g.txt; h | i\n"
        "cat > j.txt <<'EOF'\nk $(l)\nEOF\nm=$(n \"o\" | p) && q '()'\nif [ $r -eq 1 ]; then s; fi"
    )
    read = [(c.words, c.environment, c.heredoc, c.writes) for c in read_shell(text)]
    assert read == [
        (("a", "b c", "d"), (), None, None),
        (("f",), ("X=1",), None, "g.txt"),
        (("h",), (), None, None),
        (("i",), (), None, None),
        (("cat",), (), "k $(l)\n", "j.txt"),
        (("n", "o"), (), None, None),
        (("p",), (), None, None),
        (("q", "()"), (), None, None),
        (("[", "$r", "-eq", "1", "]"), (), None, None),
        (("s",), (), None, None),
    ]
    with pytest.raises(ValueError, match="line 1: the heredoc has no EOF"):
        list(read_shell("cat <<EOF\nx"))
    with pytest.raises(ValueError, match="line 2: the command does not end"):
        list(read_shell("a\nb 'c"))


# ------------------------------------------------------------------------------------------ blocks


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks(page):
    """Every block says what it is, and is that."""
    text = page.read_text()
    for block in fenced_blocks(text):
        where = f"{name_of(page)}, line {block.line}"
        assert block.language in LANGUAGES, f"{where}: a block needs one of {LANGUAGES}"
        if block.language == "python":
            compile(block.text, where, "exec")
        elif block.language == "yaml":
            assert isinstance(yaml.safe_load(block.text), dict), where
        elif block.language == "json":
            json.loads(block.text)
        elif block.language in SHELL:
            assert list(read_shell(block.text)), where
        elif block.language == "text":
            first = block.text.split(maxsplit=1)[0]
            assert first not in {"python", "make", "pip", "torchrun", "$"}, f"{where}: `sh` instead"
    for number, line in enumerate(without_blocks(text).splitlines(), start=1):
        assert not re.match(r" {4,}(python|make|pip|torchrun|srun|#!/) ?", line), (
            f"{name_of(page)}, line {number}: commands go into a fenced block"
        )


# ------------------------------------------------------------------- links, keys, paths, options


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links(page):
    broken = []
    for line, target in links(page.read_text()):
        if re.match(r"(https?|mailto):", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or not file.is_relative_to(ROOT):
            broken.append(f"line {line}: {target}: no such file")
        elif anchor and (file.suffix != ".md" or anchor not in anchors(file.read_text())):
            broken.append(f"line {line}: {target}: no such heading")
    assert broken == []


def test_links_and_anchors_are_found():
    page = (
        "# A *b*: c, `d`\n[x](y.md#z) ![p](q.png)\n```text\n[no](no.md)\n```\n## Twice\n## Twice\n"
    )
    assert links(page) == [(2, "y.md#z"), (2, "q.png")]
    assert anchors(page) == {"a-b-c-d", "twice", "twice-1"}
    assert inline_code("a `b\nc` ``d`e``\n") == [(1, "b c"), (2, "d`e")]


@pytest.mark.parametrize("page", PROSE, ids=name_of)
def test_config_keys(page):
    """A key in the text is a key of the config, or a part of it."""
    cfg, unknown = make_cfg(), []
    nodes = "|".join(key for key, value in cfg.items() if isinstance(value, CfgNode))
    for name in re.findall(rf"\b(?:{nodes})(?:\.[A-Z0-9_]+)+\b", page.read_text()):
        node = cfg
        for part in name.split("."):
            if not isinstance(node, CfgNode) or part not in node:
                unknown.append(name)
                break
            node = node[part]
    assert unknown == []


@pytest.mark.parametrize("page", [*PROSE, *SCRIPTS], ids=name_of)
def test_paths(page, produced):
    """A path in code, inline or in a block, exists, or some command of the pages makes it."""
    text = page.read_text()
    if page.suffix == ".py":
        code = [usage_lines(text)]
    else:
        shown = [each.text for each in fenced_blocks(text) if each.language in (*SHELL, "python")]
        code = [*(span for _, span in inline_code(text)), *shown]
    missing = set()
    for path in re.findall(
        r"(?<![\w/.$}~-])((?:configs|tools|docs|requirements|projects|tests|output|hierkd)/[\w./*{},-]*)",
        "\n".join(code),
    ):
        path = path.rstrip(".,/")
        if path.split("/")[0] == "output":
            if not any(
                f"{path}/".startswith(f"{each}/") or each.startswith(f"{path}/")
                for each in produced
            ):
                missing.add(path)
            continue
        root = ROOT / "projects" / "HierKD" if path.startswith("hierkd/") else ROOT
        braces = re.search(r"{([^}]*)}", path)
        for part in braces[1].split(",") if braces else ("",):
            one = path.replace(braces[0], part) if braces else path
            if not list(root.glob(one)):
                missing.add(one)
    assert missing == set()


@pytest.mark.parametrize("page", PROSE, ids=name_of)
def test_options_in_the_prose(page):
    """An --option in the text is one of a script's, or of a program of others."""
    sources = [*SCRIPTS, *(ROOT / "projects" / "HierKD" / "hierkd").rglob("*.py")]
    ours = "\n".join(path.read_text() for path in sources)
    detectron2s = {
        *("--config-file", "--resume", "--eval-only", "--num-gpus", "--num-machines"),
        *("--machine-rank", "--dist-url"),
    }
    others = {
        "--require-hashes",
        "--strict",
        "--no-deps",
        "--nnodes",
        "--nproc-per-node",
        "--signal",
    }
    others |= {"--no-index", "--find-links", "--no-build-isolation", "--disable-pip", "--help"}
    unknown = {
        option
        for _, span in inline_code(page.read_text())
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", span)
        if f'"{option}"' not in ours
    }
    assert unknown - detectron2s - others == set()


@pytest.mark.parametrize("page", PROSE, ids=name_of)
def test_names_of_datasets_and_variables(page):
    text = page.read_text()
    datasets = set(re.findall(r"\b(?:coco|miniature)_ovd_\w+", text))
    datasets = {name.strip("_") for name in datasets if not name.endswith("_")}
    families = {name.rsplit("_", 2)[0] for name in DatasetCatalog.list() if "_ovd_" in name}
    assert datasets - set(DatasetCatalog.list()) - families == set()
    sources = "\n".join(p.read_text() for p in (ROOT / "projects").rglob("*.py"))
    for variable in set(re.findall(r"\bHIERKD_\w+|\bDETECTRON2_\w+", text)):
        assert variable in sources, variable


@pytest.mark.parametrize("page", PROSE, ids=name_of)
def test_names_of_tests(page):
    """`test_kill.py::test_x` is a test; a file without its folder is found wherever it lies."""
    missing, files = [], []
    for _, span in inline_code(page.read_text()):
        match = re.fullmatch(r"(?:tests/)?((?:\w+/)*test_\w+\.py)?(?:::(test_\w+))?", span)
        if match is None or not any(match.groups()):
            continue
        files = sorted((ROOT / "tests").rglob(match[1])) if match[1] else files
        names = {
            node.name
            for file in files
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.FunctionDef)
        }
        if not files or (match[2] and match[2] not in names):
            missing.append(span)
    assert missing == []
