"""Every name in the paper map exists."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAPER_MAP = (ROOT / "projects" / "HierKD" / "README.md").read_text(encoding="utf-8")
NAMES = sorted(set(re.findall(r"`(hierkd(?:\.\w+)+)`", PAPER_MAP)))
FILES = sorted(set(re.findall(r"`((?:configs|tools)/[\w/.-]+)`", PAPER_MAP)))


def resolve(name: str) -> object:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[end:]:
            found = getattr(found, attribute)
        return found
    raise ModuleNotFoundError(name)


def test_the_map_is_read():
    assert len(NAMES) > 25
    assert len(FILES) >= 2


@pytest.mark.parametrize("name", NAMES)
def test_names_import(name):
    assert resolve(name) is not None


@pytest.mark.parametrize("file", FILES)
def test_files_exist(file):
    assert (ROOT / file).is_file()


@pytest.mark.parametrize("equation", range(1, 7))
def test_every_equation_is_mapped(equation):
    assert f"Eq. {equation}" in PAPER_MAP
