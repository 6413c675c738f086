"""Check, or complete, the Python environment that this script runs in.

``environment.py check`` lists what HierKD needs and the environment lacks, and changes nothing.
``environment.py install`` installs exactly that. Something that is importable and new enough is
always kept, whatever it was installed from: an official detectron2, OpenAI's own ``clip``, an
OpenCV with a GUI. The requirements are those of pyproject.toml, plus detectron2, which is not on
PyPI under its own name (requirements/detectron2.txt). ``environment.py pack`` fills the folder
``gpu_pack`` with packages for a GPU machine that has PyTorch and no network.
"""

import argparse
import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MINIMUM_PYTHON = (3, 11)

# What the tests and the miniature need. The other extras of pyproject.toml are for who asks for
# them, and tests of theirs are skipped where they are missing; two of them are not in the lock.
EXTRAS = ("miniature", "dev")

# What `pack` takes from the lock, for Linux and Python 3.12; the first are published as sources,
# all of Python. PyTorch, NumPy, Pillow, OpenCV, Matplotlib and TensorBoard are too large to travel.
PACKED_SOURCES = ("antlr4-python3-runtime", "fvcore", "iopath")
PACKED_WHEELS = (
    *("annotated-types", "clip-anytorch", "cloudpickle", "faster-coco-eval", "ftfy", "hydra-core"),
    *("iniconfig", "omegaconf", "open-clip-torch", "pluggy", "portalocker", "pycocotools"),
    *("pydantic", "pydantic-core", "pytest", "qtawesome", "setuptools", "tabulate", "termcolor"),
    *("typing-extensions", "typing-inspection", "wcwidth", "yacs"),
)
NOT_PACKED = ("__pycache__", "tests", "bin", "detectron2/_C.*", "detectron2/projects")

# Where the import name is not the distribution's name. Stubs have nothing to import.
IMPORT_NAMES = {
    "clip-anytorch": "clip",
    "hydra-core": "hydra",
    "opencv-python-headless": "cv2",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "setuptools": "pkg_resources",
    "types-pyyaml": None,
}


def pip(*arguments: str) -> None:
    """Run this environment's pip, and end the script with pip's status if it fails."""
    status = subprocess.call([sys.executable, "-m", "pip", *arguments], cwd=ROOT)
    if status != 0:
        sys.exit(status)


def is_importable(name: str) -> bool:
    """Return whether a top-level module of this name can be found, without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def missing_requirements() -> "list[str]":
    """Return the requirements of pyproject.toml (with EXTRAS) that are not met here.

    A module that is importable although its distribution is not installed under the name that
    pyproject.toml gives counts as met: it came from elsewhere, and its version is unknown.
    """
    import tomllib

    from packaging.requirements import Requirement

    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    missing = []
    extras = [project["optional-dependencies"][name] for name in EXTRAS]
    for text in sum(extras, project["dependencies"]):
        requirement = Requirement(text)
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        module = IMPORT_NAMES.get(name, name.replace("-", "_"))
        try:
            version = importlib.metadata.version(name)
            met = requirement.specifier.contains(version, prereleases=True)
        except importlib.metadata.PackageNotFoundError:
            met = module is not None
        if not met or (module is not None and not is_importable(module)):
            missing.append(text)
    return missing


def install_detectron2(site_packages: Path) -> None:
    """Install the pinned detectron2 archive into a folder of packages, without its ``tools``.

    The archive also holds a top-level package ``tools`` (detectron2's scripts), which would hide
    this project's directory of that name, so only the rest is moved into site-packages. It is
    marked as built for Python 3.10; see requirements/detectron2.txt for why that is harmless.
    """
    with tempfile.TemporaryDirectory(prefix=".detectron2-", dir=site_packages) as folder:
        options = ["--no-deps", "--only-binary=:all:", "--python-version", "3.10", "--no-compile"]
        pin = str(ROOT / "requirements" / "detectron2.txt")
        pip("install", "-q", *options, "--target", folder, "--require-hashes", "-r", pin)
        for item in Path(folder).iterdir():
            if item.name == "detectron2" or item.name.endswith(".dist-info"):
                shutil.rmtree(site_packages / item.name, ignore_errors=True)
                item.rename(site_packages / item.name)


def build_options() -> "list[str]":
    """Build with the environment's own setuptools if it is new enough: nothing more is fetched."""
    import tomllib

    from packaging.requirements import Requirement

    with open(ROOT / "pyproject.toml", "rb") as file:
        (needed,) = map(Requirement, tomllib.load(file)["build-system"]["requires"])
    try:
        version = importlib.metadata.version(needed.name)
    except importlib.metadata.PackageNotFoundError:
        return []
    return ["--no-build-isolation"] if needed.specifier.contains(version) else []


def install() -> None:
    """Install what is missing, then the package itself, and import the parts that may clash."""
    if not is_importable("packaging"):
        pip("install", "-q", "packaging")
    missing = missing_requirements()
    if missing:
        pip("install", *missing)
    if not is_importable("detectron2"):
        install_detectron2(Path(sysconfig.get_path("purelib")))
    pip("install", "-q", "--no-deps", *build_options(), "-e", ".")
    modules = "torchvision, detectron2.model_zoo, clip, cv2, pycocotools.mask"
    if subprocess.call([sys.executable, "-W", "ignore", "-c", f"import {modules}"], cwd=ROOT):
        sys.exit(f"error: {sys.executable} has everything installed, but cannot import it.")


def pack() -> None:
    """Unpack into ``gpu_pack`` what a machine with a GPU, and with PyTorch, may lack."""
    lock = (ROOT / "requirements" / "lock.txt").read_text()
    pins = re.findall(r"^[a-z][^\\\n]*(?:\\\n[^\\\n]*)*", lock, re.MULTILINE)
    platforms = [f"--platform=manylinux{v}_x86_64" for v in ("_2_28", "_2_27", "_2_17", "2014")]
    wheels = ["--only-binary=:all:", "--python-version=3.12", *platforms, "--platform=any"]
    sources = ["--use-pep517", "--no-build-isolation"]
    with tempfile.TemporaryDirectory(prefix="build", dir=ROOT) as scratch:
        part, folder = Path(scratch) / "part.txt", Path(scratch) / "packages"
        for names, options in ((PACKED_SOURCES, sources), (PACKED_WHEELS, wheels)):
            part.write_text("\n".join(pin for pin in pins if pin.split("==")[0] in names))
            target = ["--no-deps", "--no-compile", "--target", str(folder), "--require-hashes"]
            pip("install", "-q", *target, *options, "-r", str(part))
        install_detectron2(folder)
        for pattern in NOT_PACKED:
            for path in [*folder.rglob(pattern)]:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        shutil.rmtree(ROOT / "gpu_pack", ignore_errors=True)
        folder.rename(ROOT / "gpu_pack")
    print(f"gpu_pack: {size / 1e6:.1f} MB. docs/install.md says what to do with it.")


def check() -> None:
    """End with a message that says what is missing and how to get it, if anything is."""
    missing = missing_requirements() if is_importable("packaging") else ["packaging"]
    if not is_importable("detectron2"):
        missing.append("detectron2")
    if missing:
        sys.exit(
            f"error: {sys.executable} lacks {', '.join(missing)}.\n"
            f"To install what it lacks there: make install PYTHON={sys.executable}\n"
            "Or leave PYTHON out, and an environment of its own is made in .venv."
        )


def main() -> None:
    """Run the command named on the command line."""
    if sys.version_info < MINIMUM_PYTHON:
        found = ".".join(map(str, sys.version_info[:3]))
        sys.exit(f"error: HierKD needs Python >= 3.11, but {sys.executable} is Python {found}.")
    commands = {"check": check, "install": install, "pack": pack}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=commands)
    commands[parser.parse_args().command]()


if __name__ == "__main__":
    main()
