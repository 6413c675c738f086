"""The whole R50 model on a pretended device: no tensor is left on the CPU, and few waits."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

import clip_files
from hierkd.benchmarks.timing import tame
from hierkd.load_config import load_config
from pretended_device import pretended_device, to_pretended_device

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real device")
IMAGES, HEIGHT, WIDTH = 8, 96, 128
PROPOSALS = ("LOSS_TYPE", "kl", "PROPOSALS_PER_IMAGE", "2", "PROPOSALS_START", "0")


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretended")
    clip = clip_files.random_clip("tiny_vit", embed_dim=512)
    clip_files.write_state_dict(folder / "clip.pt", clip)
    own = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "DATASETS.TRAIN", "()"]
    own += ["MODEL.TEACHER.WEIGHTS", str(folder / "clip.pt"), "MODEL.IKD.IOU_THRESH", "0.0"]
    own += ["MODEL.TEACHER.TEXT_CACHE_DIR", str(folder)]

    def _build(*ikd):
        keys = [word if i % 2 else f"MODEL.IKD.{word}" for i, word in enumerate(ikd)]
        cfg = load_config("configs/hierkd_R50.yaml", [*own, *keys])
        torch.manual_seed(0)
        model = build_model(cfg)
        tame(model)
        model.set_vocabulary([f"class {number}" for number in range(48)])
        return model

    return _build


def batch(captions: str) -> list[dict]:
    generator, samples = torch.Generator().manual_seed(0), []
    for number in range(IMAGES):
        instances = Instances((HEIGHT, WIDTH))
        instances.gt_boxes = Boxes(torch.tensor([[8.0, 8, 70, 72], [40, 20, 120, 90]]))
        instances.gt_classes = torch.tensor([number, 40])
        size = 3, HEIGHT, WIDTH
        image = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
        caption = f"{captions} {number}"
        samples.append({"image": image, "instances": instances, "caption": caption})
    return samples


def move(model):
    teacher = model.teacher
    to_pretended_device(teacher._clip("the test").model)
    teacher.device = torch.device("cuda")
    to_pretended_device(model)


def losses_of(model, inputs):
    torch.manual_seed(1)  # of the sampled negatives
    with EventStorage():
        return {name: loss.item() for name, loss in model.train()(inputs).items()}


@pytest.mark.parametrize("ikd", [(), PROPOSALS], ids=["paper", "proposals"])
def test_a_step_has_no_mixed_devices_and_waits_rarely(build, ikd):
    model = build(*ikd)
    expected = losses_of(model, batch("seen on the CPU"))
    with pretended_device() as waits:
        move(model)
        losses = losses_of(model, batch("seen on the device"))  # texts that are in no cache
    del waits["elsewhere"]  # the test's own
    assert 5 < sum(waits.values()) + len(losses) <= 20, waits  # each loss is logged
    for name in {"loss_cls", "loss_box_reg", "loss_iou"} | ({"loss_ikd"} if not ikd else set()):
        assert losses[name] == pytest.approx(expected[name], rel=1e-4), name


def test_inference_has_no_mixed_devices_and_waits_rarely(build):
    model = build().eval()
    inputs = [{"image": each["image"]} for each in batch("")[:2]]
    (expected, _) = model(inputs)
    with pretended_device() as waits:
        move(model)
        (found, _) = model(inputs)
        boxes = found["instances"].pred_boxes.tensor.cpu()
    del waits["elsewhere"]
    assert 0 < sum(waits.values()) <= 8 * len(inputs), waits
    torch.testing.assert_close(boxes, expected["instances"].pred_boxes.tensor)


def test_what_a_gpu_refuses_is_refused():
    with pretended_device() as waits:
        ours, theirs = torch.ones(3, device="cuda"), torch.ones(3)
        with pytest.raises(RuntimeError, match=r"add.*cuda:0 and on cpu"):
            ours + theirs
        assert not waits
        assert (ours + theirs.to("cuda")).tolist() == [2.0, 2.0, 2.0]
        assert bool(ours[ours > 0].sum() == 3)
    assert waits == {"elsewhere": 3}
