"""The text cache by itself; what a teacher makes of it is in test_teacher.py."""

import multiprocessing
from pathlib import Path

import numpy as np

from hierkd.teachers.text_cache import TextCache


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


def test_the_file_is_hardly_larger_than_what_it_holds(tmp_path):
    """Of CLIP's ordinary size, 512, of captions, and of texts that come in a few at a time."""
    path, vector = tmp_path / "cache.sqlite", np.full(512, 512**-0.5, np.float32)
    texts = [f"a caption of a picture, number {index}, with a horse" for index in range(1500)]
    for start in range(0, len(texts), 50):
        TextCache(path).write(dict.fromkeys(texts[start : start + 50], vector), 512, 100.0)
    held = sum(4 * 512 + 4 + 64 + len(text) for text in texts)  # CRC-32 and key
    assert held < path.stat().st_size < 1.5 * held
    assert len(TextCache(path).read(texts)) == len(texts)
