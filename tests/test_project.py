"""Promises about the project as a whole: layers, forbidden constructs, dependencies, commands."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools import environment

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "projects" / "HierKD" / "hierkd"

# What the modules of a folder may import from the package, beside their own folder. `config`,
# `files` and `checkpoint` are modules that know none of the folders.
BASE = {"config", "files", "checkpoint"}
DETECTOR = BASE | {"teachers", "modeling", "data"}
ANYTHING = DETECTOR | {"load_config", "inference", "evaluation", "reports", "training"}
ANYTHING |= {"experiments"}
ALLOWED = {
    "config": set(),
    "command": set(),
    "files": set(),
    "checkpoint": {"files"},
    "teachers": BASE,
    "modeling": BASE | {"teachers"},
    "data": BASE,
    "load_config": DETECTOR | {"miniature"},
    "inference": DETECTOR | {"load_config"},
    "evaluation": DETECTOR,
    "reports": DETECTOR | {"load_config", "inference", "evaluation"},
    "training": DETECTOR | {"load_config", "inference", "evaluation", "reports"},
    "experiments": ANYTHING,
    "miniature": ANYTHING,
    "benchmarks": ANYTHING | {"miniature"},
}

# The only ones that know a CLIP's package; everything else sees the Teacher protocol.
CLIP_IMPORTERS = {"clip": "teachers.openai_clip", "open_clip": "teachers.open_clip"}

# Import names that differ from the distribution that pyproject.toml declares.
DISTRIBUTIONS = {
    "clip": "clip-anytorch",
    "cv2": "opencv-python-headless",
    "open_clip": "open_clip_torch",
    "PIL": "pillow",
    "yaml": "pyyaml",
}

SOURCES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    """Return a source's name inside the package: ``data.splits``; ``data`` for its __init__."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Yield every absolute module name imported anywhere, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            assert node.module is not None
            if node.module == "hierkd":  # `from hierkd import files` names a module
                yield from (f"hierkd.{alias.name}" for alias in node.names)
            else:
                yield node.module


def layer_violations(name: str, source: str) -> list[str]:
    """Return what the module ``name`` imports from the package although its folder may not."""
    room = name.split(".")[0]
    rooms = {
        m.split(".")[1] for m in imported_modules(ast.parse(source)) if m.startswith("hierkd.")
    }
    return sorted(rooms - ALLOWED[room] - {room, "__version__"})


def functions_with_cfg(source: str) -> list[str]:
    """Return the functions that take a ``cfg`` although they do not build from one."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            builds = node.name == "from_config" or re.match(r"_?(build|add)_", node.name)
            if not builds and any(argument.arg == "cfg" for argument in arguments):
                found.append(f"{node.lineno}: {node.name}")
    return found


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_every_folder_has_a_rule() -> None:
    assert {module_name(path).split(".")[0] for path in SOURCES} - {""} == set(ALLOWED)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_only_what_its_folder_may(path: Path) -> None:
    if path.parent != PACKAGE or path.name != "__init__.py":
        assert layer_violations(module_name(path), path.read_text()) == []


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_package_has_no_forbidden_constructs(path: Path) -> None:
    assert path.name not in {"utils.py", "util.py", "misc.py", "helpers.py"}
    for node in ast.walk(ast.parse(path.read_text())):  # ruff finds print and a bare except
        assert not isinstance(node, ast.Assert), f"{node.lineno}: raise an error with its cause"
        assert not (isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path")


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_only_builders_know_cfg(path: Path) -> None:
    room = module_name(path).split(".")[0]
    if room not in {"training", "load_config", "inference"}:  # what the entry scripts share
        assert functions_with_cfg(path.read_text()) == []


@pytest.mark.parametrize("package", CLIP_IMPORTERS)
def test_only_one_module_imports_a_clip(package: str) -> None:
    importers = {
        module_name(path)
        for path in SOURCES
        if any(m.split(".")[0] == package for m in imported_modules(ast.parse(path.read_text())))
    }
    assert importers == {CLIP_IMPORTERS[package]}


def test_every_third_party_import_is_declared(project: dict) -> None:
    declared = {
        canonicalize_name(Requirement(text).name)
        for extra in (project["dependencies"], *project["optional-dependencies"].values())
        for text in extra
    }
    sources = [*SOURCES, ROOT / "train_net.py", ROOT / "demo.py", *ROOT.glob("tools/*.py")]
    for path in sources:
        top_level = {m.split(".")[0] for m in imported_modules(ast.parse(path.read_text()))}
        for module in top_level - sys.stdlib_module_names - {"hierkd", "detectron2", "train_net"}:
            distribution = canonicalize_name(DISTRIBUTIONS.get(module, module))
            assert distribution in declared, f"{path.name} imports {module}: not in pyproject.toml"


def read_lock(*names: str) -> dict[str, str]:
    """Return distribution -> version, for lines that pin exactly one."""
    pins: dict[str, str] = {}
    for name in names:
        joined = (ROOT / "requirements" / name).read_text().replace("\\\n", "")
        for line in joined.splitlines():
            text = line.split(" --hash=")[0].split("#")[0].strip()
            if not text:
                continue
            requirement = Requirement(text)
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", f"{name}: {line} is not an exact version"
            assert "*" not in specifier.version, f"{name}: {line} is not an exact version"
            key = canonicalize_name(requirement.name)
            assert key not in pins, f"{key} is pinned twice"
            pins[key] = specifier.version
    return pins


def test_lock_satisfies_the_declared_dependencies(project: dict) -> None:
    pins = read_lock("lock.txt", "lock-torch.txt")
    declared = list(project["dependencies"])
    extras = project["optional-dependencies"]
    assert set(environment.EXTRAS) <= set(extras)
    assert {*environment.PACKED_SOURCES, *environment.PACKED_WHEELS} <= set(pins)
    for extra in set(extras) - {"peers", "supervision"}:  # what `make venv` installs
        declared += extras[extra]
    for text in declared:
        requirement = Requirement(text)
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"{text} is not in the lock"
        assert requirement.specifier.contains(version), f"{text}, but the lock has {version}"


@pytest.mark.parametrize("name", ["lock.txt", "lock-torch.txt", "detectron2.txt"])
def test_every_locked_version_is_pinned_by_hash(name: str) -> None:
    text = (ROOT / "requirements" / name).read_text().replace("\\\n", "")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert len(lines) == len(read_lock(name))
    for line in lines:
        assert re.search(r"^\S+==\S+( ;[^;]*?)?(\s+--hash=sha256:[0-9a-f]{64})+$", line), line[:80]
