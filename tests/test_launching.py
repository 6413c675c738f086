"""``train_net.py`` in several processes on a CPU: how they start, agree, and end.

Two processes must do what one process with the whole batch does: the run switches off what differs
by design (batch statistics, sampled negatives) and gathers the contrast.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import tiny_training
import train_net
from forked_runs import ROOT, Run
from hierkd.training.launch import check_devices

EXACT = [
    *("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", "GN", "MODEL.ATSS.NORM", "GN"),
    *("MODEL.ATSS.NEGATIVE_AMOUNT", "1.0", "MODEL.IKD.MAX_CROPS_PER_IMAGE", "0"),
    *("MODEL.IKD.IOU_THRESH", "0.0", "MODEL.IKD.LOSS_WEIGHT", "1.0"),
    *("MODEL.GKD.LOSS_WEIGHT", "1.0", "MODEL.GKD.GATHER", "True"),
    *("SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", "0.01", "SOLVER.MAX_ITER", "3"),
    *("SOLVER.IMS_PER_BATCH", "4", "SOLVER.CHECKPOINT_PERIOD", "100"),
    *("MODEL.FPN.OUT_CHANNELS", "32", "TEST.IMS_PER_BATCH", "1"),  # batches differ in rounding
]
ENDLESS = [*EXACT, "SOLVER.MAX_ITER", "1000000", "SOLVER.IMS_PER_BATCH", "2"]
TRAINING = r"iter: 19 "


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with tiny_training.prepared(tmp_path_factory.mktemp("launching")) as root:
        yield root


def line(world, output, *options):
    return tiny_training.command_line(output, world / "clip.pt", *options)


def start(world, output, *options, arrange=int, **environment):
    """A run that is forked from here; its options stand before its KEY VALUE pairs."""
    return Run(line(world, output, *options), output.with_suffix(".txt"), environment, arrange)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def machines(world, folder, *options, **of_second):
    """The same run on two "machines" that meet on the loopback interface."""
    url = f"--dist-url=tcp://127.0.0.1:{free_port()}"
    flags = ("--num-machines=2", url)
    return [
        start(world, folder / f"machine{rank}", f"--machine-rank={rank}", *flags, *options, **more)
        for rank, more in enumerate([{}, of_second])
    ]


def succeed(*runs):
    with contextlib.ExitStack() as stack:
        for run in runs:
            stack.enter_context(run)
        assert [run.wait() for run in runs] == [0] * len(runs), runs[-1].text()[-3000:]


def workers(run):
    """Pids of the processes that a run has started, by rank."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            found += [int(entry.name)] * (parent == run.process.pid)
    return sorted(found)


def metrics(output):
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


def weights(output):
    return torch.load(output / "model_final.pth", weights_only=True)["model"]


@pytest.fixture(scope="module")
def alone(world):
    """The folder of one process with the whole batch."""
    tiny_training.call_main(line(world, world / "alone", *EXACT))
    return world / "alone"


def assert_same_run(found, alone):
    """Weights, losses and detections of one process with the whole batch."""
    (losses,) = [each for each in metrics(found) if "total_loss" in each]
    (expected,) = [each for each in metrics(alone) if "total_loss" in each]
    names = [name for name in expected if name.startswith("loss")]
    assert len(names) == 6
    for name in (*names, "total_loss"):
        assert losses[name] == pytest.approx(expected[name], rel=1e-4), name
        assert expected[name] > 0
    ours, wanted = weights(found), weights(alone)
    assert ours.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-5, msg=name)
    assert best_detections(found) == pytest.approx(best_detections(alone), abs=1e-2)


def detections(output, dataset="miniature_ovd_val_all"):
    path = output / "inference" / dataset / "coco_instances_results.json"
    found = json.loads(path.read_text())
    return sorted(found, key=lambda d: (d["image_id"], d["category_id"], -d["score"], d["bbox"]))


def best_detections(output):
    """Image, score and category of the twelve best, in one order."""
    found = detections(output)
    assert {each["image_id"] for each in found} == {1, 2, 3, 4, 5, 6}
    best = [each for each in found if each["score"] >= sorted(d["score"] for d in found)[-12]]
    best.sort(key=lambda d: (d["image_id"], d["category_id"], d["bbox"]))
    return [n for d in best for n in (d["image_id"], d["score"], d["category_id"])]


# --------------------------------------------------------------------------------- equal results


def test_two_processes_are_one_with_the_whole_batch(world, alone, tmp_path):
    succeed(start(world, tmp_path / "run", "--num-gpus=2", *EXACT))
    assert_same_run(tmp_path / "run", alone)
    assert (tmp_path / "run" / "log.txt.rank1").exists()


def test_two_machines(world, alone, tmp_path):
    succeed(*machines(world, tmp_path, *EXACT))
    assert_same_run(tmp_path / "machine0", alone)
    # only the first process writes results
    assert not (tmp_path / "machine1" / "model_final.pth").exists()
    assert not (tmp_path / "machine1" / "metrics.json").exists()


def torchrun_environment(rank, size=2, local_size=2):
    ranks = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": local_size}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1, "TORCHELASTIC_RUN_ID": "none"}
    return {key: str(value) for key, value in (ranks | address).items()}


def test_under_torchrun(world, alone, tmp_path):
    port = {"MASTER_PORT": str(free_port())}
    runs = [
        start(world, tmp_path / "run", *EXACT, **torchrun_environment(rank) | port)
        for rank in range(2)
    ]
    succeed(*runs)
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.gpu
def test_one_process_under_nccl(world, alone, tmp_path):
    environment = torchrun_environment(0, size=1, local_size=1) | {"MASTER_PORT": str(free_port())}
    succeed(start(world, tmp_path / "run", *EXACT, "MODEL.DEVICE", "cuda", **environment))
    (loss,), (expected,) = (
        [each["total_loss"] for each in metrics(folder) if "total_loss" in each]
        for folder in (tmp_path / "run", alone)
    )
    assert loss == pytest.approx(expected, rel=0.02)  # TF32 in convolutions


@pytest.mark.slow
@pytest.mark.parametrize("how", ["--num-gpus", "torchrun"])
def test_in_fresh_interpreters(world, alone, tmp_path, how):
    """As a user types it: nothing forked. torchrun on two machines with two processes each."""
    port, commands = free_port(), []
    for rank in range(1 if how == "--num-gpus" else 2):
        options = [f"--nnodes=2 --node-rank={rank} --nproc-per-node=2 --master-addr=127.0.0.1"]
        launcher = ["-m", "torch.distributed.run", *options[0].split(), f"--master-port={port}"]
        flags = ["--num-gpus=2"] if how == "--num-gpus" else []
        arguments = line(world, tmp_path / f"machine{rank}", *flags, *EXACT)
        commands.append([sys.executable, *([] if flags else launcher), "train_net.py", *arguments])
    environment = {**os.environ, "DETECTRON2_DATASETS": str(world)}
    runs = [subprocess.Popen(each, cwd=ROOT, env=environment) for each in commands]
    try:
        assert [run.wait(240) for run in runs] == [0] * len(runs)
    finally:
        for run in runs:
            run.kill()
    assert_same_run(tmp_path / "machine0", alone)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [3, 8])
def test_evaluation_sees_each_image_once(world, alone, tmp_path, processes):
    # six images: 2 + 2 + 2, and two processes without any
    options = ["--eval-only", f"--num-gpus={processes}", *EXACT]
    run = start(world, tmp_path / "run", *options, "MODEL.WEIGHTS", str(alone / "model_final.pth"))
    succeed(run)
    for name in ("miniature_ovd_val_all", "miniature_ovd_val_novel"):
        assert detections(tmp_path / "run", name) == detections(alone, name)
    table = r"\| (?:base|novel|all) .*"
    assert re.findall(table, run.text()) == re.findall(table, (alone / "log.txt").read_text())
    assert len(re.findall(table, run.text())) == 4  # base, novel and all; novel alone


# ----------------------------------------------------------------------------------- faulty ends


def test_the_process_that_starts_others_passes_a_signal_on(world, tmp_path):
    """What ``kill``, ``docker stop`` and batch systems do: they know it alone."""
    with start(world, tmp_path / "run", "--num-gpus=2", *ENDLESS) as run:
        run.wait_for("Starting training")
        time.sleep(0.3)
        os.kill(run.process.pid, signal.SIGUSR1)
        assert run.wait(60) == 128 + signal.SIGUSR1, run.text()
    assert "Traceback" not in run.text()
    (saved,) = (tmp_path / "run").glob("model_*.pth")
    done = torch.load(saved, weights_only=True)["iteration"] + 1
    assert f"SIGUSR1: stopped after iteration {done} of" in run.text()


@pytest.mark.slow
def test_a_killed_process_ends_the_others(world, tmp_path):
    with start(world, tmp_path / "run", "--num-gpus=2", *ENDLESS) as run:
        run.wait_for(TRAINING)
        both = workers(run)
        assert len(both) == 2
        os.kill(both[1], signal.SIGKILL)
        assert run.wait(60) == 1
        assert re.search("process 1 terminated with signal SIGKILL|closed by peer", run.text())
        assert not any(Path(f"/proc/{pid}").exists() for pid in both)


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_others_after_the_timeout(world, tmp_path):
    minutes = 0.2
    flags = ["--num-gpus=2", f"--dist-timeout={minutes}"]
    with start(world, tmp_path / "run", *flags, *ENDLESS) as run:
        run.wait_for(TRAINING)
        stopped = time.monotonic()
        os.kill(workers(run)[1], signal.SIGSTOP)
        assert run.wait(60 * minutes + 60) != 0
        assert time.monotonic() - stopped > 60 * minutes - 2
        assert re.search(r"[Tt]imed? ?out", run.text())


def test_data_that_only_one_machine_has(world, tmp_path):
    absent = partial(tiny_training.register_anew, str(tmp_path / "absent"))
    first, second = machines(world, tmp_path, *EXACT, arrange=absent)
    with first, second:
        assert all(run.wait(90) != 0 for run in (first, second))
        assert "FileNotFoundError" in second.text()
        assert "failed in process 1" in first.text()


# ------------------------------------------------------------------------------- refused at once


def told(*options, device="cpu"):
    """The one error of a command line, with a config and MODEL.DEVICE."""
    args = train_net.get_parser().parse_args(["--config-file", tiny_training.CONFIG, *options])

    def check():
        train_net.check_arguments(args)
        check_devices(args.num_gpus, device)

    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        check()
    return str(caught.value)


GPUS = torch.cuda.device_count()


@pytest.mark.parametrize(
    ("options", "device", "named"),
    [
        (["--num-gpus", str(GPUS + 2)], "cuda", f"this machine has {GPUS} CUDA devices"),
        (["--num-gpus", "2"], "cuda:0", "MODEL.DEVICE cuda:0 is one device for all processes"),
        (["--num-gpus", "0"], "cpu", "--num-gpus must be positive, got 0"),
        (["--dist-timeout", "0"], "cpu", "--dist-timeout must be positive, got 0"),
        (["--num-machines", "2", "--machine-rank", "2"], "cpu", "--machine-rank must be 0 to 1"),
        (["--config-file", ""], "cpu", "--config-file FILE is needed"),
        (["--config-file", "", "a.yaml"], "cpu", "--config-file is missing in front of a.yaml"),
        (["--config-file", "gone.yaml"], "cpu", "no file 'gone.yaml'"),
    ],
)
def test_refused_command_lines(options, device, named):
    assert named in told(*options, device=device)


def test_options_that_torchrun_decides(monkeypatch):
    for name, value in torchrun_environment(1, size=4).items():
        monkeypatch.setenv(name, value)
    message = told("--num-gpus", "2")
    assert "torchrun has started 4 processes already" in message
    assert "--nproc-per-node" in message
    if GPUS < 2:
        assert "torchrun --nproc-per-node 2: this machine has" in told(device="cuda")
