"""Clipping of the whole gradient, and that everything else is detectron2's and torch's own."""

import copy
import math

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.solver import build_optimizer as build_detectron2_optimizer
from torch import nn

from hierkd.config import add_hierkd_config
from hierkd.training.optimizer import FULL_MODEL_CLIP, build_optimizer, check_optimizer_state


def make_cfg(**solver):
    cfg = get_cfg()
    add_hierkd_config(cfg)
    cfg.SOLVER.BASE_LR = 0.1
    cfg.SOLVER.MOMENTUM = 0.9
    cfg.SOLVER.WEIGHT_DECAY = 0.01
    cfg.SOLVER.WEIGHT_DECAY_NORM = 0.003
    for key, value in solver.items():
        node = cfg.SOLVER.CLIP_GRADIENTS if key in cfg.SOLVER.CLIP_GRADIENTS else cfg.SOLVER
        node[key] = value
    return cfg


def full_model_cfg(**solver):
    return make_cfg(ENABLED=True, CLIP_TYPE=FULL_MODEL_CLIP, CLIP_VALUE=10.0, **solver)


def plain_sgd(**solver):
    """Full-model clipping in which a step is nothing but lr times the gradient."""
    settings = {"BASE_LR": 1.0, "MOMENTUM": 0.0, "WEIGHT_DECAY": 0.0, "WEIGHT_DECAY_NORM": 0.0}
    return full_model_cfg(**(settings | solver))


def make_model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))


def set_gradients(model, size, seed=0):
    """Random gradients with the given norm of them all together; returned as copies."""
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(p.shape, generator=generator) for p in model.parameters()]
    total = math.sqrt(sum(float((g**2).sum()) for g in gradients))
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient * (size / total)
    return [p.grad.clone() for p in model.parameters()]


def norm_of(tensors):
    return math.sqrt(sum(float((t.double() ** 2).sum()) for t in tensors))


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def steps_taken(model, optimizer, count=4, size=50.0):
    for step in range(count):
        set_gradients(model, size, seed=step)
        optimizer.step()
    return values(model)


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("optimizer_name", ["SGD", "ADAMW"])
def test_a_big_gradient_is_shortened_to_ten(optimizer_name):
    model, cfg = make_model(), full_model_cfg(OPTIMIZER=optimizer_name)
    cfg.freeze()
    config = cfg.dump()
    optimizer = build_optimizer(cfg, model)
    assert (cfg.dump(), cfg.is_frozen()) == (config, True)
    before = set_gradients(model, 250.0)
    optimizer.step()
    after = [p.grad for p in model.parameters()]
    assert norm_of(after) == pytest.approx(10.0, rel=1e-4)
    for a, b in zip(after, before, strict=True):  # one factor for all: the direction is kept
        torch.testing.assert_close(a, b / 25, rtol=1e-4, atol=1e-7)


def test_with_amp_the_unscaled_gradient_is_clipped():
    model, x = make_model(), torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    plain = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer, plain_optimizer = (build_optimizer(plain_sgd(), m) for m in (model, plain))
    scaler.scale((100 * model(x)).pow(2).mean()).backward()
    scaler.step(optimizer)
    (100 * plain(x)).pow(2).mean().backward()
    assert norm_of(p.grad for p in plain.parameters()) > 10
    plain_optimizer.step()
    for a, b in zip(values(model), values(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert norm_of(p.grad for p in model.parameters()) == pytest.approx(10.0, rel=1e-4)


@pytest.mark.parametrize(
    "clip",
    [
        {"ENABLED": False},
        {"ENABLED": False, "CLIP_TYPE": FULL_MODEL_CLIP},
        {"ENABLED": True, "CLIP_TYPE": "value", "CLIP_VALUE": 0.5},
        {"ENABLED": True, "CLIP_TYPE": "norm", "CLIP_VALUE": 3.0},
    ],
    ids=str,
)
def test_otherwise_it_is_detectron2s(clip):
    ours, theirs = make_model(), make_model()
    cfg = make_cfg(**clip)
    stepped = steps_taken(ours, build_optimizer(cfg, ours))
    assert_same(stepped, steps_taken(theirs, build_detectron2_optimizer(cfg, theirs)))
    assert norm_of(a - b for a, b in zip(stepped, values(make_model()), strict=True)) > 0.1


@pytest.mark.parametrize("optimizer_name", ["SGD", "ADAMW"])
def test_norms_and_biases_have_their_own_settings(optimizer_name):
    model = make_model()
    apart = {"WEIGHT_DECAY_BIAS": 0.007, "BIAS_LR_FACTOR": 2.0}
    optimizer = build_optimizer(make_cfg(OPTIMIZER=optimizer_name, **apart), model)
    found = {
        name: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for name, p in model.named_parameters()
        if any(p is each for each in group["params"])
    }
    assert found == {
        **dict.fromkeys(("0.weight", "2.weight"), (0.1, 0.01)),
        **dict.fromkeys(("0.bias", "2.bias"), (0.2, 0.007)),
        "1.weight": (0.1, 0.003),
        "1.bias": (0.2, 0.007),
    }


def test_errors_name_both_sides():
    with pytest.raises(ValueError, match="SGD or ADAMW, got 'LION'"):
        build_optimizer(make_cfg(OPTIMIZER="LION"), make_model())
    cfg = make_cfg(OPTIMIZER="ADAMW", ENABLED=True, CLIP_TYPE="value")
    with pytest.raises(ValueError, match="'full_model' only, got 'value'"):
        build_optimizer(cfg, make_model())
    with pytest.raises(ValueError, match="bogus"):
        build_optimizer(make_cfg(ENABLED=True, CLIP_TYPE="bogus"), make_model())


# --------------------------------------------------------------------------------------- resuming


def trained_state(model, **solver):
    """State of an optimizer that has done a step."""
    optimizer = build_optimizer(full_model_cfg(**solver), model)
    set_gradients(model, 1.0)
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize("name", ["SGD", "ADAMW"])
def test_the_state_of_the_same_training_goes_on(name):
    optimizer = build_optimizer(full_model_cfg(OPTIMIZER=name), make_model())
    check_optimizer_state(optimizer, trained_state(make_model(), OPTIMIZER=name))
    check_optimizer_state(optimizer, optimizer.state_dict())  # before the first step


@pytest.mark.parametrize(
    ("name", "layers", "message"),
    [
        ("ADAMW", make_model, "its optimizer is no SGD"),
        ("SGD", lambda: make_model()[:2], "it has 4 trained parameters, this run 6"),
        (
            "SGD",
            lambda: nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)),
            r"parameter 2 has shape \(4, 5\), in this run \(2, 5\)",
        ),
    ],
)
def test_the_state_of_another_training_is_refused(name, layers, message):
    optimizer = build_optimizer(full_model_cfg(OPTIMIZER="SGD"), make_model())
    with pytest.raises(ValueError, match=rf"--resume.*another training: {message}\. Resume with"):
        check_optimizer_state(optimizer, trained_state(layers(), OPTIMIZER=name))
