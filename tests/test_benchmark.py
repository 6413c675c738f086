"""tools/benchmark.py: its subcommands; and how soon the experiments answer."""

import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tools.benchmark import get_parser, main


@pytest.mark.parametrize("name", ["step", "infer", "vocabulary", "peers"])
def test_a_subcommand_has_the_options_that_its_module_takes(name):
    options = vars(get_parser().parse_args([name, "--rounds", "2"]))
    run = import_module(f"hierkd.benchmarks.{name}").run
    common = {"subcommand", "threads", "output"}
    assert set(options) - common == set(inspect.signature(run).parameters)
    assert options["rounds"] == 2


def test_a_device_that_is_none_is_named(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["infer", "--device", "toaster"])
    assert exit_info.value.code == 2
    assert "--device" in capsys.readouterr().err


@pytest.mark.parametrize(
    "tool",
    [
        *("benchmark", "clip_on_boxes", "miniature_study"),
        *("reproduce", "run_demo"),
    ],
)
def test_the_command_line_is_parsed_before_pytorch_is_imported(tool):
    """By then the package has said that PyTorch's threads are not to spin for long."""
    path = Path(__file__).resolve().parent.parent / "tools" / f"{tool}.py"
    code = f"""
import os, runpy, sys
for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
    os.environ.pop(name, None)
sys.argv = ["tool", "--help"]
try:
    runpy.run_path({str(path)!r}, run_name="__main__")
finally:
    import hierkd
    assert os.environ["GOMP_SPINCOUNT"] == "2000"
    assert not {{"torch", "detectron2"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:")
