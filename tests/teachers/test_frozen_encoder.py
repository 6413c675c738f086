import pytest
import torch
from torch import nn
from torch.nn import functional as F

import clip_files
from hierkd.teachers.frozen_encoder import fold_batch_norms, make_batch


def randomise(module):
    """Give every normalisation statistics and weights that matter."""
    generator = torch.Generator().manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.weight, part.bias, part.running_mean):
                tensor.data.normal_(generator=generator)
            part.running_var.uniform_(0.5, 2.0, generator=generator)


@torch.no_grad()
def test_folded_resnet_of_clip_computes_the_same():
    visual = clip_files.random_clip("tiny_resnet").visual
    randomise(visual)
    crops = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    expected = visual(crops)
    norms = sum(isinstance(part, nn.BatchNorm2d) for part in visual.modules())
    assert fold_batch_norms(visual) == norms == 3 + 4 * 4  # stem; blocks with their shortcut
    assert not any(isinstance(part, nn.BatchNorm2d) for part in visual.modules())
    found = visual(crops)
    # The activations of random weights are large; what counts is the direction.
    torch.testing.assert_close(F.normalize(found), F.normalize(expected), atol=1e-5, rtol=0)
    assert fold_batch_norms(visual) == 0


def test_folding_by_hand():
    part = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1, eps=0.0)).eval()
    part[0].weight.data.fill_(3.0)
    part[1].weight.data.fill_(5.0)
    part[1].bias.data.fill_(7.0)
    part[1].running_mean.fill_(2.0)
    part[1].running_var.fill_(4.0)
    assert fold_batch_norms(part) == 1
    # 5 (3 x - 2) / sqrt(4) + 7 = 7.5 x + 2
    assert part[0].weight.item() == pytest.approx(7.5)
    assert part[0].bias.item() == pytest.approx(2.0)
    assert isinstance(part[1], nn.Identity)


def test_a_transformer_has_nothing_to_fold():
    visual = clip_files.random_clip("tiny_vit").visual
    before = {name: value.clone() for name, value in visual.state_dict().items()}
    assert fold_batch_norms(visual) == 0
    assert all(torch.equal(value, before[name]) for name, value in visual.state_dict().items())


def test_statistics_of_training_are_not_folded():
    with pytest.raises(ValueError, match="evaluation mode"):
        fold_batch_norms(nn.BatchNorm2d(2).train())


@pytest.mark.parametrize(("count", "multiple", "rows"), [(5, 4, 8), (8, 4, 8), (5, 1, 5)])
def test_batches_are_filled_up_with_zeros(count, multiple, rows):
    crops = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    batch = make_batch(crops, torch.float16, multiple)
    assert batch.shape == (rows, 3, 6, 6)
    assert batch.dtype == torch.float16
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch[:count], crops.half())
    assert (batch[count:] == 0).all()
