"""A checkpoint remembers which classes it was trained on."""

from types import SimpleNamespace

import pytest

from hierkd.training.trainer import Trainer


def test_other_classes_are_refused_by_name():
    run = SimpleNamespace(vocabulary=lambda: ["car", "cat"])
    with pytest.raises(ValueError, match=r"--resume: .*lack \['cat'\] and have \['dog'\]"):
        Trainer.load_state_dict(run, {"vocabulary": ["car", "dog"]})
