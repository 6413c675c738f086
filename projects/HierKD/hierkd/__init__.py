"""HierKD: open-vocabulary one-stage detection with hierarchical knowledge distillation.

Importing the package registers the datasets and the model with detectron2's catalogs.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

# detectron2 0.7 and fvcore use these on every import and every step; nothing a user could mend.
warnings.filterwarnings("ignore", message=".*`?torch.jit.script`? is deprecated")
warnings.filterwarnings("ignore", message="torch.meshgrid: in an upcoming release")

import hierkd.data  # noqa: E402
import hierkd.modeling  # noqa: E402, F401

if TYPE_CHECKING:
    from hierkd.engine.predictor import OpenVocabularyPredictor

__all__ = ["OpenVocabularyPredictor", "__version__"]

__version__ = "0.1.0"

_LAZY = {"OpenVocabularyPredictor": "hierkd.engine.predictor"}


def __getattr__(name: str) -> Any:
    """Import a name of the public API when it is first used: scripts that train need none of it."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
