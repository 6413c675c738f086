import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import clip_files
from hierkd.modeling import onednn
from hierkd.modeling.teacher import CLIPTeacher

pytestmark = pytest.mark.skipif(
    onednn._linear_pointwise is None, reason="this PyTorch has no oneDNN"
)


@pytest.fixture(autouse=True)
def small_layers_count(monkeypatch):
    monkeypatch.setattr(onednn, "_FEW_WEIGHTS", 0)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def products(monkeypatch):
    """The shapes of the weights of the products that oneDNN computes."""
    operator, shapes = onednn._linear_pointwise, []

    def spy(inputs, weight, *others):
        shapes.append(tuple(weight.shape))
        return operator(inputs, weight, *others)

    monkeypatch.setattr(onednn, "_linear_pointwise", spy)
    return shapes


@pytest.mark.parametrize("shape", [(6,), (0, 6), (5, 6), (2, 3, 6)])
@pytest.mark.parametrize("bias", [None, random(4, seed=2)])
def test_a_linear_layer(products, shape, bias):
    inputs, weight = random(*shape), random(4, 6, seed=1)
    with torch.no_grad():
        found = onednn.linear(inputs, weight, bias)
    torch.testing.assert_close(found, F.linear(inputs, weight, bias))
    assert products == [(4, 6)]


def test_what_onednn_cannot_compute_is_pytorchs(products):
    inputs, weight = random(5, 6), random(4, 6, seed=1).requires_grad_()
    onednn.linear(inputs, weight).sum().backward()
    assert weight.grad is not None
    with torch.no_grad():
        assert onednn.linear(inputs.double(), weight.double()).dtype == torch.float64
    assert products == []


@pytest.mark.parametrize("name", ["tiny_vit", "tiny_resnet"])
@torch.no_grad()
def test_clip_computes_the_same(products, name):
    model = clip_files.random_clip(name).float()
    changed = copy.deepcopy(model)
    assert onednn.use_onednn(changed) > 0
    number = sum(each.numel() for each in model.parameters())
    assert sum(each.numel() for each in changed.parameters()) == number
    size = model.visual.input_resolution
    crops = random(3, 3, size, size)
    tokens = torch.randint(1, 40, (4, model.context_length))
    for method, inputs in (("encode_image", crops), ("encode_text", tokens)):
        expected = F.normalize(getattr(model, method)(inputs), dim=-1)
        found = F.normalize(getattr(changed, method)(inputs), dim=-1)
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    assert products  # or it would have compared PyTorch with itself


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", [None, "added", "kept out"])
@torch.no_grad()
def test_self_attention(products, batch_first, mask):
    attention = nn.MultiheadAttention(12, 3, batch_first=batch_first).eval()
    nn.init.normal_(attention.in_proj_bias)
    nn.init.normal_(attention.out_proj.bias)
    module = nn.Sequential(copy.deepcopy(attention)).eval()
    assert onednn.use_onednn(module) == 1
    tokens = random(2, 5, 12)
    if mask is not None:
        mask = torch.full((tokens.shape[1 if batch_first else 0],) * 2, -torch.inf).triu(1)
        if len(mask) == 5:
            mask[3, 1] = -torch.inf
    for each in (mask, mask == -torch.inf) if mask is not None else (None,):
        expected = attention(tokens, tokens, tokens, need_weights=False, attn_mask=each)
        found = module[0](tokens, tokens, tokens, need_weights=False, attn_mask=each)
        torch.testing.assert_close(found[0], expected[0])
        assert found[1] is expected[1] is None
    assert products[:2] == [(36, 12), (12, 12)]


@torch.no_grad()
def test_other_attention_is_pytorchs(products):
    attention = nn.MultiheadAttention(12, 3).eval()
    module = nn.Sequential(attention).eval()
    onednn.use_onednn(module)
    tokens, others = random(5, 2, 12), random(4, 2, 12, seed=1)
    torch.testing.assert_close(module[0](tokens, others, others), attention(tokens, others, others))
    weights = module[0](tokens, tokens, tokens)[1]
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 5))
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[:, 3:] = True
    arguments = {"need_weights": False, "key_padding_mask": padding}
    torch.testing.assert_close(
        module[0](tokens, tokens, tokens, **arguments)[0],
        attention(tokens, tokens, tokens, **arguments)[0],
    )
    assert products == []


def test_what_has_extra_keys_or_few_weights_is_left(monkeypatch):
    layers = [nn.Linear(3, 4), nn.MultiheadAttention(12, 3, add_zero_attn=True)]
    monkeypatch.setattr(onednn, "_FEW_WEIGHTS", 13)
    module = nn.Sequential(*layers).eval()
    assert onednn.use_onednn(module) == 0
    assert list(module) == layers


def test_without_onednn_nothing_changes(monkeypatch):
    monkeypatch.setattr(onednn, "_linear_pointwise", None)
    module = nn.Sequential(nn.Linear(3, 4)).eval()
    assert onednn.use_onednn(module) == 0
    assert type(module[0]) is nn.Linear


def test_training_needs_derivatives():
    with pytest.raises(ValueError, match="evaluation mode"):
        onednn.use_onednn(nn.Linear(2, 2).train())


def test_the_teacher_uses_it(products, tmp_path):
    teacher = CLIPTeacher(
        str(clip_files.write_state_dict(tmp_path / "clip.pt", clip_files.random_clip())),
        device="cpu",
        text_cache_dir=str(tmp_path / "text"),
    )
    image, boxes = torch.rand(3, 40, 40) * 255, torch.tensor([[3.0, 4.0, 30.0, 20.0]])
    teacher.encode_regions([image], [boxes], 1.5)
    regions = len(products)
    teacher.encode_captions(["a red box"])
    assert len(products) > regions > 0
