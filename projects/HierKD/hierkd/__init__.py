"""HierKD: open-vocabulary one-stage detection with hierarchical knowledge distillation."""

import hierkd.data  # noqa: F401  (registers the datasets)

__version__ = "0.1.0"
