"""HierKD: open-vocabulary one-stage detection with hierarchical knowledge distillation.

Importing the package is quick. The first use of one of its public names imports PyTorch and
detectron2, and registers the datasets and the model with detectron2's catalogs.
"""

from __future__ import annotations

import importlib
import os
import warnings
from typing import TYPE_CHECKING, Any

# Read when PyTorch is imported. Its threads on a CPU (libgomp) otherwise spin for milliseconds
# while they wait for one another: beside another program a step then takes ten times as long.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
# detectron2 0.7 and fvcore use these on every import and every step; nothing a user could mend.
warnings.filterwarnings("ignore", message=".*`?torch.jit.script`? is deprecated")
warnings.filterwarnings("ignore", message="torch.meshgrid: in an upcoming release")

if TYPE_CHECKING:
    from hierkd.config import add_hierkd_config
    from hierkd.inference.predictor import OpenVocabularyPredictor
    from hierkd.training.trainer import Trainer

__all__ = ["OpenVocabularyPredictor", "Trainer", "__version__", "add_hierkd_config"]

__version__ = "0.1.0"

_HOME = {
    "OpenVocabularyPredictor": "hierkd.inference.predictor",
    "Trainer": "hierkd.training.trainer",
    "add_hierkd_config": "hierkd.config",
}
_REGISTERING = ("hierkd.data", "hierkd.modeling", "hierkd.miniature")


def __getattr__(name: str) -> Any:
    """Import a name of the public API when it is first used."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import detectron2  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError(
            f"hierkd needs detectron2, which PyPI does not have ({error}): pip install "
            "--no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"
        ) from error
    for module in _REGISTERING:
        importlib.import_module(module)
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
