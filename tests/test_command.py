"""Every script of the repository: --help, and Ctrl-C."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("datasets/*.py")]
SHORT = {"environment.py", "lock_hashes.py", "onnx_consumer.py"}  # of the standard library


def test_help_ends_with_0():
    started = {
        path.name: subprocess.Popen([sys.executable, path, "--help"], stdout=subprocess.PIPE)
        for path in SCRIPTS
    }
    said = {name: process.communicate()[0] for name, process in started.items()}
    assert {name: each.returncode for name, each in started.items()} == dict.fromkeys(started, 0)
    assert all(text.startswith(b"usage: ") for text in said.values())


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_ctrl_c_is_heard_by(path):
    assert path.name in SHORT or "\n    run_command(" in path.read_text()


def test_ctrl_c_ends_with_a_line():
    code = """
import time
from hierkd.command import run_command
run_command(lambda: print("ready", flush=True) or time.sleep(60))
"""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **options) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, "\n-c: stopped by Ctrl-C\n")
