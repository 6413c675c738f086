"""The cosine classifier: by hand, and that the vocabulary is data, not weights."""

import math

import pytest
import torch
import torch.nn.functional as F

from hierkd.modeling.text_classifier import TextClassifier

D = 6


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def classifier(num_classes=4, **kwargs):
    module = TextClassifier(random(D, seed=99), **kwargs)
    module.set_vocabulary(random(num_classes, D, seed=num_classes))
    return module


def test_logits_by_hand():
    module = TextClassifier(torch.tensor([0.0, -5.0]), logit_scale=10.0)
    module.set_vocabulary(torch.tensor([[2.0, 0.0], [3.0, 4.0]]))
    # directions (1, 0), (0.6, 0.8) and, last, the background (0, -1)
    logits = module(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    torch.testing.assert_close(logits, torch.tensor([[10.0, 6.0, 0.0], [0.0, 8.0, -10.0]]))


def test_length_of_text_embeddings_carries_no_meaning():
    module, points = classifier(), F.normalize(random(3, D), dim=1)
    logits = module(points)
    module.set_vocabulary(7 * random(4, D, seed=4))
    torch.testing.assert_close(module(points), logits)
    with torch.no_grad():
        module.background_embedding.mul_(3)
    torch.testing.assert_close(module(points), logits)


def test_gradient_flows_to_everything_but_the_vocabulary():
    texts = random(4, D, seed=4).requires_grad_()
    module = TextClassifier(random(D))
    module.set_vocabulary(texts)
    points = F.normalize(random(3, D, seed=5), dim=1).requires_grad_()
    module(points).pow(2).sum().backward()
    assert texts.grad is None
    assert not module.text_embeddings.requires_grad
    for leaf in (points, module.background_embedding, module.logit_scale):
        assert leaf.grad.abs().sum() > 0
    # only the direction of the background is learned
    along = module.background_embedding.grad @ module.background_embedding
    assert along.abs() < 1e-3 * module.background_embedding.grad.norm()


def test_the_checkpoint_knows_no_vocabulary():
    small, large = classifier(2), classifier(9, logit_scale=50.0)
    assert set(small.state_dict()) == {"background_embedding", "logit_scale"}
    assert {name for name, _ in small.named_parameters()} == set(small.state_dict())
    before = large.text_embeddings.clone()
    large.load_state_dict(small.state_dict())  # 2 classes into 9, strictly
    assert torch.equal(large.text_embeddings, before)
    assert torch.equal(large.background_embedding, small.background_embedding)
    assert large.logit_scale.item() == 100.0
    assert (large.num_classes, large.embed_dim) == (9, D)


def test_projection_sets_the_background_itself_back_to_unit_length():
    model = classifier(project_background=True)
    with torch.no_grad():
        model.background_embedding.mul_(3.0)
    model.eval()
    model(F.normalize(random(5, D), dim=1))
    torch.testing.assert_close(model.background_embedding.norm(), torch.tensor(3.0))
    model.train()
    embeddings = F.normalize(random(5, D), dim=1)
    logits = model(embeddings)
    torch.testing.assert_close(model.background_embedding.norm(), torch.tensor(1.0))
    usual = classifier()
    torch.testing.assert_close(logits, usual(embeddings))
    # the gradient is that of a plain dot product: it has a part along the embedding
    logits[:, -1].sum().backward()
    expected = model.logit_scale.detach() * embeddings.sum(dim=0)
    torch.testing.assert_close(model.background_embedding.grad, expected)


def test_errors_name_both_sides():
    module = TextClassifier(random(D))
    with pytest.raises(RuntimeError, match="set_vocabulary"):
        module(random(2, D))
    with pytest.raises(ValueError, match=r"\(K, 6\).*got \(3, 5\)"):
        module.set_vocabulary(torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"\(K, 6\).*got \(6,\)"):
        module.set_vocabulary(torch.ones(6))
    with pytest.raises(ValueError, match="at least one class"):
        module.set_vocabulary(torch.zeros(0, D))
    bad = random(4, D)
    bad[1], bad[3, 2] = 0.0, float("nan")
    with pytest.raises(ValueError, match=r"rows \[1, 3\]"):
        module.set_vocabulary(bad)
    assert module.num_classes == 0  # a refused vocabulary leaves no trace


def test_tau_c_stays_in_its_range():
    module = classifier(logit_scale=20.0)
    for value, expected in ((-3.0, 1.0), (7e8, 1000.0), (20.125, 20.125)):
        with torch.no_grad():
            module.logit_scale.fill_(value)
        module.limit_logit_scale()
        assert module.logit_scale.item() == expected
    with torch.no_grad():
        module.logit_scale.fill_(math.nan)
    module.limit_logit_scale()
    assert module.logit_scale.isnan()  # for the guard of the training to find
