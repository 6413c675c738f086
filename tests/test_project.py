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

# A module imports only from layers above its own, that is, from lines before its own.
# A package's __init__ may import the package's own modules, and hierkd/__init__ the packages.
LAYERS = [
    "atomic_files safe_files cache_root engine.metrics_file modeling.logit_scales data.resizing"
    " engine.hardware engine.cpu_memory modeling.clip_model modeling.text_cache"
    " modeling.frozen_encoder",
    "config data.splits data.coco_json data.loader data.dataset_mapper"
    " data.definitions data.dataset_report evaluation.transfer"
    " modeling.losses modeling.sampling modeling.region_crops modeling.mlca"
    " modeling.text_classifier modeling.text_embeddings modeling.head modeling.atss"
    " modeling.backbone modeling.gathering modeling.crop_merging"
    " modeling.openai_clip modeling.open_clip_models"
    " modeling.teacher_cache modeling.input_checks modeling.detector_settings"
    " modeling.class_probabilities modeling.preselection"
    " engine.checkpoint engine.optimizer engine.results engine.visualization engine.inputs"
    " engine.paper_tables evaluation.coco_eval benchmarks.timing"
    " engine.soak engine.histories engine.non_finite engine.agreement evaluation.completeness",
    "data.datasets data.official_coco modeling.teacher modeling.distilled_regions"
    " engine.warm_start engine.runs engine.reproduction engine.interruption"
    " evaluation.ground_truth engine.detections engine.page",
    "modeling.cached_teacher engine.launching engine.images engine.demo_outputs engine.run_record",
    "data.prepare data.name_checks",
    "data.custom",
    "engine.config",
    "data.miniature modeling.meta_arch evaluation.split_coco_evaluation"
    " engine.predictor engine.cache_teacher engine.replay",
    "evaluation.direct_inference evaluation.proposal_evaluation evaluation.upper_bound"
    " evaluation.heat_maps evaluation.federated_evaluation engine.gallery engine.tiny_clip"
    " engine.soak_load modeling.exportable engine.json_lines engine.web_page",
    "engine.sections engine.figures engine.export",
    "engine.report engine.run_report engine.monitoring engine.demonstration",
    "benchmarks.random_models benchmarks.crops benchmarks.eval benchmarks.loader",
    "benchmarks.step benchmarks.infer benchmarks.vocabulary benchmarks.peers benchmarks.floor"
    " benchmarks.onnx",
]
LAYER_OF = {module: number for number, line in enumerate(LAYERS) for module in line.split()}

# The only ones that know a CLIP's package; everything else sees the Teacher protocol.
CLIP_IMPORTERS = {"clip": "modeling.openai_clip", "open_clip": "modeling.open_clip_models"}

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
            # `from hierkd.data import splits` names a module, too.
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                is_module = full.removeprefix("hierkd.") in LAYER_OF
                yield full if is_module else node.module


def layer_violations(name: str, source: str) -> list[str]:
    """Return the modules of the package that the module ``name`` may not import, but does."""
    imports = {m for m in imported_modules(ast.parse(source)) if re.match(r"hierkd(\.|$)", m)}
    wrong = []
    for imported in sorted(m.removeprefix("hierkd").removeprefix(".") for m in imports):
        if name in LAYER_OF:
            allowed = imported in LAYER_OF and LAYER_OF[imported] < LAYER_OF[name]
        else:  # an __init__
            allowed = imported.startswith(f"{name}." if name else "")
        if not allowed:
            wrong.append(imported)
    return wrong


def forbidden_constructs(source: str) -> list[str]:
    """Return the constructs that the package does without, each with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id == "print":
                found.append(f"{node.lineno}: print (log instead)")
        elif isinstance(node, ast.Assert):
            found.append(f"{node.lineno}: assert (raise an error that names the cause)")
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path":
            found.append(f"{node.lineno}: sys.path")
        elif isinstance(node, ast.ImportFrom) and node.module == "sys":
            found += [f"{node.lineno}: sys.path" for a in node.names if a.name == "path"]
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append(f"{node.lineno}: bare except")
    return found


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


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_only_from_layers_above(path: Path) -> None:
    name = module_name(path)
    if path.name != "__init__.py":
        assert name in LAYER_OF, f"give {name} a layer in {Path(__file__).name}"
    assert layer_violations(name, path.read_text()) == []


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_package_has_no_forbidden_constructs(path: Path) -> None:
    assert path.name not in {"utils.py", "util.py", "misc.py", "helpers.py"}
    assert forbidden_constructs(path.read_text()) == []


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_only_builders_know_cfg(path: Path) -> None:
    if path.parent.name != "engine":  # what the entry scripts share
        assert functions_with_cfg(path.read_text()) == []


@pytest.mark.parametrize("package", CLIP_IMPORTERS)
def test_only_one_module_imports_a_clip(package: str) -> None:
    importers = {
        module_name(path)
        for path in SOURCES
        if any(m.split(".")[0] == package for m in imported_modules(ast.parse(path.read_text())))
    }
    assert importers == {CLIP_IMPORTERS[package]}


def test_the_checks_above_can_fail() -> None:
    assert layer_violations("data.splits", "from hierkd.data import datasets") == ["data.datasets"]
    assert layer_violations("data.datasets", "import hierkd.data.splits") == []
    assert layer_violations("data.splits", "import hierkd.config") == ["config"]
    assert layer_violations("data.datasets", "import hierkd") == [""]
    assert layer_violations("data", "import hierkd.modeling.head") == ["modeling.head"]
    assert layer_violations("", "import hierkd.data") == []
    source = "def f(cfg):\n try:\n  print(1); assert 0; sys.path.append(2)\n except:\n  pass"
    assert len(forbidden_constructs(source)) == 4
    assert functions_with_cfg(source) == ["1: f"]
    assert functions_with_cfg("def build_head(cfg): ...") == []


def test_every_third_party_import_is_declared(project: dict) -> None:
    declared = {
        canonicalize_name(Requirement(text).name)
        for extra in (project["dependencies"], *project["optional-dependencies"].values())
        for text in extra
    }
    sources = [*SOURCES, ROOT / "train_net.py", ROOT / "demo.py", *ROOT.glob("tools/*.py")]
    for path in sources:
        if not path.exists():
            continue
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
    for extra in set(extras) - {"peers"}:  # what `make venv` installs
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


def test_the_makefile_installs_locks_with_their_hashes() -> None:
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", "")
    installs = [line for line in makefile.splitlines() if re.search(r"pip install.* -r ", line)]
    assert len(installs) >= 3
    assert all("--require-hashes" in line for line in installs)


def test_commands_of_the_readme_are_targets_of_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    readme = (ROOT / "README.md").read_text()
    named = set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", readme, re.MULTILINE))
    assert {"demo", "test"} <= named
    assert named <= targets


def test_scripts_of_the_makefile_exist() -> None:
    for script in re.findall(r"\$\(PY\) (\S+\.py)", (ROOT / "Makefile").read_text()):
        assert (ROOT / script).is_file(), f"the Makefile runs {script}"


@pytest.mark.parametrize("folder", ["datasets", "tools", "configs", "tests"])
def test_folders_of_scripts_are_not_packages(folder: str) -> None:
    assert list((ROOT / folder).rglob("__init__.py")) == []
