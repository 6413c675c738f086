"""HierKD: open-vocabulary one-stage detection with hierarchical knowledge distillation."""

__version__ = "0.1.0"
