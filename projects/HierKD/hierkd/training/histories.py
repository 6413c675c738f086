"""Histories of the metrics that do not grow for as long as a run lasts."""

from __future__ import annotations

from collections import defaultdict
from functools import partial

from detectron2.engine import HookBase
from fvcore.common.history_buffer import HistoryBuffer

__all__ = ["BoundHistories"]

# The longest look back of all of detectron2's writers: the estimated time of arrival is a median
# over so many iterations. [detectron2]
_LENGTH = 1000


class BoundHistories(HookBase):  # type: ignore[misc]  # detectron2 is untyped
    """Lets the event storage forget what no writer asks for.

    detectron2 keeps the last million values of each metric: for HierKD's sixteen some 2 kB per
    iteration, 180 MB in a 1x schedule. Averages over the whole run do not need them.
    """

    def before_train(self) -> None:
        """Shorten the histories that are made from now on."""
        self.trainer.storage._history = defaultdict(partial(HistoryBuffer, max_length=_LENGTH))
