"""Whether an evaluation saw every image exactly once, however many processes shared them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

__all__ = ["check_each_image_once"]


def check_each_image_once(
    seen: Iterable[int | str],
    expected: Collection[int | str],
    dataset_name: str,
    *,
    complete: bool,
) -> None:
    """Refuse figures from images that were counted twice or not at all.

    Args:
        seen: Ids of the images that the processes had, one for each time.
        expected: Ids of the images of the dataset.
        dataset_name: For the message.
        complete: Whether every image must have been seen.

    Raises:
        ValueError: It says how many are missing or repeated, and names the first few.
    """
    times = Counter(seen)
    repeated = [each for each, number in times.items() if number > 1]
    missing = [each for each in expected if each not in times] if complete else []
    problems = [
        f"{len(ids):,} {what}, such as {sorted(ids, key=str)[:5]}"
        for ids, what in ((missing, "are missing"), (repeated, "came more than once"))
        if ids
    ]
    if problems:
        raise ValueError(
            f"dataset {dataset_name!r} has {len(expected):,} images, each of which must be "
            f"evaluated once: {'; '.join(problems)}"
        )
