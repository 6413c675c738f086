"""Training in several processes: two real ones with gloo on the CPU, against one with all images.

GKD equals that of one process only with ``MODEL.GKD.GATHER``; without it, each process contrasts
its own images, as in the paper.
"""

import json
import time

import ddp_processes
import pytest
import torch
import torch.multiprocessing
from ddp_processes import BATCHES, CONTRAST, GATHERED_BATCH, NUM_PROCESSES, SHARES

import tiny_training

TIMEOUT = 300  # seconds; some ten are needed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What both processes left. They are ended, and the tests fail, if they wait for each other."""
    root = tmp_path_factory.mktemp("ddp")
    tiny_training.write_world(root)
    tiny_training.write_clip(root / "clip.pt")
    context = torch.multiprocessing.spawn(
        ddp_processes.process, (root,), nprocs=NUM_PROCESSES, join=False
    )
    deadline = time.monotonic() + TIMEOUT
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f"no end after {TIMEOUT} s"
    finally:
        for process in context.processes:
            process.kill()
    return root


@pytest.fixture(scope="module")
def results(folder):
    return [torch.load(folder / f"{rank}.pth") for rank in range(NUM_PROCESSES)]


@pytest.fixture(scope="module")
def run_alone():
    """Losses and gradients of one process that has the whole batch."""

    def _run(objects, **overrides):
        with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
            # put back what make_detector replaces
            patch.setattr(ddp_processes.meta_arch, "build_teacher", None)
            detector = ddp_processes.make_detector(**overrides)
        batch = ddp_processes.make_batch(objects)
        return ddp_processes.losses_and_gradients(detector, detector, batch)

    return _run


@pytest.fixture(scope="module")
def alone(run_alone):
    """The same of one process that has the whole batch."""
    return {name: run_alone(objects) for name, objects in BATCHES.items()}


@pytest.mark.parametrize("batch", ["unequal", "one without a box"])
@pytest.mark.parametrize("loss", ["loss_cls", "loss_box_reg", "loss_iou", "loss_ikd", "total"])
def test_gradients_are_those_of_one_process(results, alone, batch, loss):
    value, expected = alone[batch][loss]
    assert value > 0
    assert any(gradient.abs().max() > 1e-4 for gradient in expected.values())
    for result in results:
        _, gradients = result[batch][loss]
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                gradient, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
    mean = sum(result[batch][loss][0] for result in results) / NUM_PROCESSES
    torch.testing.assert_close(mean, value, rtol=1e-5, atol=1e-6)


def test_the_processes_had_different_losses(results):
    # else the test above would not see whether anything is shared out and averaged
    a, b = (result["unequal"]["total"][0] for result in results)
    assert abs(a - b) > 0.01


def test_a_process_without_any_box(results):
    losses = results[0]["one without a box"]
    assert losses["loss_cls"][0] > 0
    assert [losses[name][0].item() for name in ("loss_box_reg", "loss_iou", "loss_ikd")] == [0] * 3


@pytest.mark.parametrize("batch", BATCHES)
def test_every_parameter_gets_a_gradient(results, batch):
    for result in results:
        gradients = result[batch]["total"][1]
        assert [name for name, gradient in gradients.items() if gradient is None] == []
        assert all(gradient.isfinite().all() for gradient in gradients.values())


# ------------------------------------------------------------------------------ gathered contrast

GKD_LOSSES = ("loss_gkd_image", "loss_gkd_caption")


@pytest.fixture(scope="module")
def contrasted_alone(run_alone):
    return run_alone(GATHERED_BATCH, **CONTRAST)


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("loss", GKD_LOSSES)
def test_gathered_contrast_is_that_of_one_process(results, contrasted_alone, shares, loss):
    expected_value, expected = contrasted_alone[loss]
    assert expected["head.embedding.weight"].abs().max() > 1e-4
    assert expected["mlca.logit_scale"].abs() > 1e-4
    for result in results:
        value, gradients = result["gather True"][shares][loss]
        torch.testing.assert_close(value, expected_value, rtol=1e-5, atol=1e-6)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            difference = (gradient - expected[name]).norm()
            assert difference <= 1e-4 * expected[name].norm() + 1e-8, name


def test_without_gathering_each_process_contrasts_its_own(results, contrasted_alone):
    first, second = (result["gather False"]["equal"]["loss_gkd_image"][0] for result in results)
    assert abs(first - second) > 1e-3
    whole = contrasted_alone["loss_gkd_image"][0]
    assert (first + second) / 2 < 0.9 * whole  # two pairs are easier to tell apart than four
    # one image alone has nothing to be told from
    assert results[1]["gather False"]["unequal"]["loss_gkd_image"][0] == 0


@pytest.mark.parametrize("loss_type", ["contrastive", "positive_only"])
def test_with_one_process_gathering_changes_no_bit(run_alone, loss_type):
    settings = CONTRAST | {"MODEL.GKD.LOSS_TYPE": loss_type}
    plain, gathered = (
        run_alone(GATHERED_BATCH, **settings, **{"MODEL.GKD.GATHER": gather})
        for gather in (False, True)
    )
    assert plain.keys() == gathered.keys()
    for name, (value, gradients) in plain.items():
        assert torch.equal(value, gathered[name][0])
        assert all(torch.equal(g, gathered[name][1][k]) for k, g in gradients.items())


def test_gathered_rows_by_hand(results):
    # process 0 has two rows, process 1 one
    joined = torch.tensor([[0.0, 1, 2], [3, 4, 5], [10, 11, 12]])
    weights = ([[1.0], [2.0]], [[3.0]])
    for result, own in zip(results, weights, strict=True):
        assert torch.equal(result["rows"]["joined"], joined)
        expected = NUM_PROCESSES * torch.tensor(own).expand(-1, 3)
        assert torch.equal(result["rows"]["gradient"], expected)
        assert torch.equal(result["rows"]["none"], torch.ones(1, 2))


def test_rows_that_do_not_fit_are_refused_in_every_process(results):
    for result in results:
        assert "(2, (3,), 'torch.float32'), (2, (4,), 'torch.float32')" in result["rows"]["refused"]


# ------------------------------------------------------------------------------ different images


@pytest.mark.parametrize("key", ["images", "images without a seed"])
def test_the_processes_train_on_different_images(results, key):
    first, second = (result[key] for result in results)
    assert len(first) == len(second) == 12
    assert sorted(first + second) == list(range(24))  # one epoch


def test_an_image_of_another_size_ends_both_processes(results):
    for result in results:
        assert result["checked"].startswith("1 of 2 images have another size")
        assert "2.png" in result["checked"]


# ------------------------------------------------------------------------------ train_net in two


def test_both_processes_end_with_the_same_weights(folder):
    first, second = (
        torch.load(folder / f"trained_{rank}.pth", weights_only=True)
        for rank in range(NUM_PROCESSES)
    )
    saved = torch.load(folder / "output" / "model_final.pth", weights_only=True)["model"]
    assert saved.keys() == first.keys()
    statistics = ("running_mean", "running_var", "num_batches_tracked")  # of each process
    for name, value in first.items():
        if not name.endswith(statistics):
            assert torch.equal(value, second[name]), name
        assert torch.equal(value, saved[name]), name


def test_the_first_process_writes_and_evaluates_all_images(folder):
    output = folder / "output"
    assert (output / "log.txt").exists()
    assert (output / "log.txt.rank1").exists()
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "total_loss" in line] == [1]
    assert any("miniature_ovd_val_all/bbox/novel/AP50" in line for line in lines)
    (detections,) = output.glob("inference/miniature_ovd_val_all/coco_instances_results.json")
    ids = {entry["image_id"] for entry in json.loads(detections.read_text())}
    assert ids == {1, 2, 3, 4, 5, 6}
