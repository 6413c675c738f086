"""HierKD: open-vocabulary one-stage detection with hierarchical knowledge distillation.

Importing the package registers the datasets and the model with detectron2's catalogs.
"""

import warnings

# detectron2 0.7 and fvcore use these on every import and every step; nothing a user could mend.
warnings.filterwarnings("ignore", message=".*`?torch.jit.script`? is deprecated")
warnings.filterwarnings("ignore", message="torch.meshgrid: in an upcoming release")

import hierkd.data  # noqa: E402
import hierkd.modeling  # noqa: E402, F401

__version__ = "0.1.0"
