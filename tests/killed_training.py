"""``train_net.py`` that kills itself, without any notice, at a moment given on the command line.

    python tests/killed_training.py MOMENT arguments of train_net.py

Moments: ``never``; ``step:N`` and ``evaluation:N``: in the N-th call of the model in training or
not; ``time:S``: S seconds after the first step began; ``write:NAME:BYTES``: when so many bytes of
the checkpoint have been written; ``rename:NAME`` and ``renamed:NAME``: right before and after
``os.replace`` gives a file this name. A NAME is a pattern, and its first match counts. Another
one kills nothing: ``hang:N``: the N-th step takes a minute.
"""

import io
import os
import runpy
import signal
import sys
import threading
import time
from fnmatch import fnmatch
from pathlib import Path

import torch


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Fuse(io.RawIOBase):
    """A file that kills the process once it has written so many bytes, which are on the disk."""

    def __init__(self, file, num_bytes):
        self._file = file
        self._left = num_bytes

    def writable(self):
        return True

    def write(self, data):
        view = memoryview(data).cast("B")
        self._file.write(view[: self._left])
        self._left -= len(view)
        if self._left <= 0:
            self._file.flush()
            kill()
        return len(view)


def kill_in_write(name, num_bytes):
    save = torch.save

    def fused(content, file):
        path = Path(str(getattr(file, "name", file))).name
        save(content, Fuse(file, int(num_bytes)) if fnmatch(path, f"*{name}*") else file)

    torch.save = fused


def kill_at_rename(name, *, before):
    replace = os.replace

    def killing(source, target, **kwargs):
        hit = fnmatch(Path(target).name, name)
        if hit and before:
            kill()
        replace(source, target, **kwargs)
        if hit:
            kill()

    os.replace = killing


def kill_in_call(number, *, training):
    from hierkd.modeling.detector import HierKD

    forward, calls = HierKD.forward, []

    def counting(self, inputs):
        if self.training == training:
            calls.append(None)
            if len(calls) == int(number):
                kill()
        return forward(self, inputs)

    HierKD.forward = counting


def kill_after(seconds):
    from hierkd.modeling.detector import HierKD

    forward, begun = HierKD.forward, []

    def starting(self, inputs):
        if self.training and not begun:
            begun.append(None)
            threading.Thread(
                target=lambda: (time.sleep(float(seconds)), kill()), daemon=True
            ).start()
        return forward(self, inputs)

    HierKD.forward = starting


def hang_in_call(number):
    from hierkd.modeling.detector import HierKD

    forward, calls = HierKD.forward, []

    def slow(self, inputs):
        calls.append(None)
        if len(calls) == int(number):
            print("hanging", flush=True)
            time.sleep(60)
        return forward(self, inputs)

    HierKD.forward = slow


def arrange(moment: str) -> None:
    kind, *rest = moment.split(":")
    if kind == "write":
        kill_in_write(*rest)
    elif kind in ("rename", "renamed"):
        kill_at_rename(*rest, before=kind == "rename")
    elif kind in ("step", "evaluation"):
        kill_in_call(*rest, training=kind == "step")
    elif kind == "time":
        kill_after(*rest)
    elif kind == "hang":
        hang_in_call(*rest)
    elif kind != "never":
        raise SystemExit(f"unknown moment {moment!r}")


if __name__ == "__main__":
    # also the folder of train_net.py, which is not a package
    root = Path(__file__).resolve().parents[1]
    arrange(sys.argv[1])
    sys.argv = [str(root / "train_net.py"), *sys.argv[2:]]
    runpy.run_path(sys.argv[0], run_name="__main__")
