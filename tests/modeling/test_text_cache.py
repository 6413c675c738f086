"""The text cache by itself; what a teacher makes of it is in test_teacher.py."""

import multiprocessing
from pathlib import Path

import numpy as np

from hierkd.modeling.text_cache import TextCache


def _write_many(path, start, barrier):
    cache = TextCache(Path(path))
    barrier.wait()
    for index in range(start, start + 60):
        vector = np.array([np.cos(index / 100), np.sin(index / 100), 0, 0], np.float32)
        cache.write({f"text {index}": vector}, 4, 100.0)
        assert cache.read([f"text {index}"])


def test_two_processes_share_a_cache(tmp_path, caplog):
    path = tmp_path / "cache.sqlite"
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    # Half of the texts are written by both.
    workers = [
        context.Process(target=_write_many, args=(path, start, barrier)) for start in (0, 30)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    texts = [f"text {index}" for index in range(90)]
    found = TextCache(path).read(texts)
    assert [round(100 * np.arctan2(*found[text][1::-1])) for text in texts] == list(range(90))
    assert not list(tmp_path.glob("*.corrupt"))
