"""``train_net.py`` in several real processes on a CPU: how they start, agree, and end.

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
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

import tiny_training
from hierkd.training import launch as launching
from hierkd.training.launch import get_parser, launch_processes

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 240  # seconds after which a command is taken to hang
EXACT = [
    *("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", "GN", "MODEL.ATSS.NORM", "GN"),
    *("MODEL.ATSS.NEGATIVE_AMOUNT", "1.0", "MODEL.IKD.MAX_CROPS_PER_IMAGE", "0"),
    *("MODEL.IKD.IOU_THRESH", "0.0", "MODEL.IKD.LOSS_WEIGHT", "1.0"),
    *("MODEL.GKD.LOSS_WEIGHT", "1.0", "MODEL.GKD.GATHER", "True"),
    *("SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", "0.01", "SOLVER.MAX_ITER", "3"),
    *("SOLVER.IMS_PER_BATCH", "4", "SOLVER.CHECKPOINT_PERIOD", "100"),
    *("MODEL.FPN.OUT_CHANNELS", "32", "TEST.IMS_PER_BATCH", "1"),  # batches differ in rounding
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("launching")
    tiny_training.write_world(root)
    tiny_training.write_clip(root / "clip.pt")
    return root


@pytest.fixture(autouse=True)
def memory_kept(monkeypatch):
    """Leave the allocator of the tests' own process alone; how often it was to be changed."""
    wanted = []
    monkeypatch.setattr(launching, "keep_freed_memory", lambda: wanted.append(True))
    return wanted


class Command:
    """A run of ``train_net.py`` that cannot outlive its test."""

    def __init__(self, world, output, *options, flags=(), launcher=(), datasets=None):
        self.output = Path(output)
        line = tiny_training.command_line(self.output, world / "clip.pt", *flags, *options)
        environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT / 'projects' / 'HierKD'}",
            "DETECTRON2_DATASETS": str(datasets or world),
            "HIERKD_CACHE": str(world / "cache"),
            "OMP_NUM_THREADS": "1",
        }
        self.log = self.output.parent / f"{self.output.name}.{time.monotonic_ns()}.txt"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, str(ROOT / "train_net.py"), *line],
                cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait(self, limit=LIMIT):
        """Seconds until it ended, and its status; the test fails if it does not end."""
        start = time.monotonic()
        try:
            status = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            pytest.fail(f"no end after {limit} s: {self.text()[-2000:]}")
        return time.monotonic() - start, status

    def succeed(self):
        with self:
            _, status = self.wait()
        assert status == 0, self.text()[-3000:]
        return self

    def text(self):
        return self.log.read_text(errors="replace")

    def wait_for(self, pattern):
        """Until its output has this."""
        deadline = time.monotonic() + LIMIT
        while not re.search(pattern, self.text()):
            assert self.process.poll() is None, self.text()[-3000:]
            assert time.monotonic() < deadline, f"{pattern!r} not in {self.text()[-2000:]}"
            time.sleep(0.1)

    def workers(self):
        """Pids of the processes that train, by rank."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                line = (entry / "cmdline").read_bytes()
            except (OSError, ProcessLookupError):
                continue
            if parent == self.process.pid and (b"spawn_main" in line):
                found.append(int(entry.name))
        return sorted(found)

    def weights(self):
        return torch.load(self.output / "model_final.pth", weights_only=True)["model"]

    def metrics(self):
        lines = (self.output / "metrics.json").read_text().splitlines()
        return [json.loads(line) for line in lines]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def machines(world, folder, *options, flags=(), datasets=(None, None), gpus=1):
    """The same run on two "machines" that meet on the loopback interface."""
    url = f"tcp://127.0.0.1:{free_port()}"
    return [
        Command(
            world,
            folder / f"machine{rank}",
            *options,
            flags=[
                *("--num-machines=2", f"--machine-rank={rank}", f"--dist-url={url}"),
                *(f"--num-gpus={gpus}", *flags),
            ],
            datasets=datasets[rank],
        )
        for rank in range(2)
    ]


def torchrun(*options):
    return ("-m", "torch.distributed.run", *options)


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    """One process with the whole batch."""
    return Command(world, tmp_path_factory.mktemp("alone") / "run", *EXACT).succeed()


def assert_same_run(found, alone):
    """Weights, losses and detections of one process with the whole batch."""
    start = {k: v for k, v in alone.metrics()[0].items() if k.startswith("loss")}
    assert len(start) == 6
    assert min(start.values()) > 0
    (losses,) = [each for each in found.metrics() if "total_loss" in each]
    (expected,) = [each for each in alone.metrics() if "total_loss" in each]
    for name in (*start, "total_loss"):
        assert losses[name] == pytest.approx(expected[name], rel=1e-4), name
    weights, wanted = found.weights(), alone.weights()
    assert weights.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-5, msg=name)
    assert detections(found) == pytest.approx(detections(alone), abs=1e-2)


def detections(run, dataset="miniature_ovd_val_all"):
    """All numbers of all detections of a dataset, in one order."""
    path = run.output / "inference" / dataset / "coco_instances_results.json"
    found = json.loads(path.read_text())
    assert {each["image_id"] for each in found} == {1, 2, 3, 4, 5, 6}
    best = [each for each in found if each["score"] >= sorted(d["score"] for d in found)[-12]]
    best.sort(key=lambda d: (d["image_id"], d["category_id"], d["bbox"]))
    return [n for d in best for n in (d["image_id"], d["score"], d["category_id"])]


# --------------------------------------------------------------------------------- equal results


def test_two_processes_are_one_with_the_whole_batch(world, alone, tmp_path):
    run = Command(world, tmp_path / "run", *EXACT, flags=["--num-gpus=2"]).succeed()
    assert_same_run(run, alone)
    assert (tmp_path / "run" / "log.txt.rank1").exists()


def test_under_torchrun(world, alone, tmp_path):
    options = torchrun("--standalone", "--nproc-per-node=2")
    assert_same_run(Command(world, tmp_path / "run", *EXACT, launcher=options).succeed(), alone)


def test_two_machines(world, alone, tmp_path):
    first, second = machines(world, tmp_path, *EXACT)
    with first, second:
        assert [run.wait()[1] for run in (first, second)] == [0, 0], second.text()[-3000:]
    assert_same_run(first, alone)
    # only the first process writes results
    assert not (second.output / "model_final.pth").exists()
    assert not (second.output / "metrics.json").exists()


@pytest.mark.slow
def test_two_machines_under_torchrun(world, alone, tmp_path):
    port = free_port()
    runs = []
    for rank in range(2):
        options = torchrun(
            *("--nnodes=2", f"--node-rank={rank}", "--nproc-per-node=2"),
            *("--master-addr=127.0.0.1", f"--master-port={port}"),
        )
        runs.append(Command(world, tmp_path / f"machine{rank}", *EXACT, launcher=options))
    with runs[0], runs[1]:
        assert [run.wait()[1] for run in runs] == [0, 0], runs[1].text()[-3000:]
    assert_same_run(runs[0], alone)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [3, 4, 8])
def test_evaluation_sees_each_image_once(world, alone, tmp_path, processes):
    # six images: 2 + 2 + 2, 2 + 2 + 1 + 1, and two processes without any
    weights = ["MODEL.WEIGHTS", str(alone.output / "model_final.pth")]
    flags = ["--eval-only", f"--num-gpus={processes}"]
    run = Command(world, tmp_path / "run", *EXACT, *weights, flags=flags).succeed()
    for name in ("miniature_ovd_val_all", "miniature_ovd_val_novel"):
        path = Path("inference") / name / "coco_instances_results.json"
        found, expected = (json.loads((r.output / path).read_text()) for r in (run, alone))
        order = lambda d: (d["image_id"], d["category_id"], -d["score"], d["bbox"])  # noqa: E731
        assert sorted(found, key=order) == sorted(expected, key=order)
    table = r"\| (?:base|novel|all) .*"
    assert re.findall(table, run.text()) == re.findall(table, alone.text())
    assert len(re.findall(table, run.text())) == 4  # base, novel and all; novel alone


# ------------------------------------------------------------------------------ unequal processes


@pytest.mark.slow
def test_images_without_a_box(world, tmp_path):
    """In most steps one of the processes has no box, in some both."""
    root = tmp_path / "world"
    tiny_training.write_world(root)
    path = root / "miniature" / "annotations" / "train_base.json"
    content = json.loads(path.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] <= 2]
    path.write_text(json.dumps(content))
    options = [*EXACT, "SOLVER.MAX_ITER", "12", "SOLVER.IMS_PER_BATCH", "2"]
    options += ["DATALOADER.FILTER_EMPTY_ANNOTATIONS", "False"]
    flags = ["--num-gpus=2"]
    run = Command(world, tmp_path / "run", *options, flags=flags, datasets=root).succeed()
    assert run.metrics()[-1]["iteration"] == 11 or run.metrics()[-1]["iteration"] == 12
    assert all(value.isfinite().all() for value in run.weights().values())


# ----------------------------------------------------------------------------------- faulty ends

ENDLESS = [*EXACT, "SOLVER.MAX_ITER", "1000000", "SOLVER.IMS_PER_BATCH", "2"]
TRAINING = r"iter: 19 "


@pytest.mark.slow
def test_a_killed_process_ends_the_others(world, tmp_path):
    with Command(world, tmp_path / "run", *ENDLESS, flags=["--num-gpus=2"]) as run:
        run.wait_for(TRAINING)
        workers = run.workers()
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        seconds, status = run.wait(60)
        print(f"ended after {seconds:.1f} s")
        assert status == 1
        assert "process 1 of this machine was ended by SIGKILL" in run.text() or (
            "Connection closed by peer" in run.text()
        )
        assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


@pytest.mark.slow
def test_a_killed_machine_ends_the_other(world, tmp_path):
    first, second = machines(world, tmp_path, *ENDLESS)
    with first, second:
        first.wait_for(TRAINING)
        os.killpg(second.process.pid, signal.SIGKILL)
        seconds, status = first.wait(60)
        print(f"ended after {seconds:.1f} s")
        assert status != 0
        assert re.search(r"closed by peer|Connection reset", first.text())


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_others_after_the_timeout(world, tmp_path):
    minutes = 0.2
    flags = ["--num-gpus=2", f"--dist-timeout={minutes}"]
    with Command(world, tmp_path / "run", *ENDLESS, flags=flags) as run:
        run.wait_for(TRAINING)
        os.kill(run.workers()[1], signal.SIGSTOP)
        seconds, status = run.wait(60 * minutes + 60)
        print(f"ended after {seconds:.1f} s")
        assert seconds > 60 * minutes - 2
        assert status != 0
        assert re.search(r"[Tt]imed? ?out", run.text())


@pytest.mark.slow
def test_a_machine_that_never_comes(world, tmp_path):
    flags = ["--num-machines=2", "--machine-rank=0", f"--dist-url=tcp://127.0.0.1:{free_port()}"]
    flags += ["--dist-timeout=0.1"]
    with Command(world, tmp_path / "run", *EXACT, flags=flags) as run:
        seconds, status = run.wait(90)
        print(f"ended after {seconds:.1f} s")
        assert status != 0
        assert re.search(r"[Tt]imed? ?out", run.text())


@pytest.mark.slow
def test_data_that_only_one_machine_has(world, tmp_path):
    first, second = machines(world, tmp_path, *EXACT, datasets=(None, tmp_path / "empty"))
    with first, second:
        ends = [run.wait(90) for run in (first, second)]
        print(f"ended after {[round(seconds, 1) for seconds, _ in ends]} s")
        assert all(status != 0 for _, status in ends)
        assert "miniature/annotations" in second.text()
        assert "FileNotFoundError" in second.text()


# ------------------------------------------------------------------------------- refused at once


def refused(*options, device="cpu"):
    with pytest.raises(SystemExit) as caught:
        launch_processes(pytest.fail, get_parser().parse_args([*options]), device)
    return str(caught.value)


def test_refused_command_lines():
    cores = len(os.sched_getaffinity(0))
    assert f"this machine has {cores} cores" in refused("--num-gpus", str(max(cores, 8) + 1))
    assert "--num-gpus must be at least 1, got 0" in refused("--num-gpus", "0")
    assert "--dist-timeout must be positive, got 0 minutes" in refused("--dist-timeout", "0")
    assert "--num-machines must be at least 1" in refused("--num-machines", "0")
    message = refused("--num-machines", "2", "--machine-rank", "2", "--dist-url", "tcp://x:1")
    assert "--machine-rank must be 0 to 1" in message
    message = refused("--num-machines", "2", "--dist-url", "auto")
    assert "such as tcp://10.0.0.1:29500" in message
    available = torch.cuda.device_count()
    message = refused("--num-gpus", str(available + 2), device="cuda")
    assert f"this machine has {available} CUDA devices" in message
    assert ("MODEL.DEVICE cpu" in message) == (available == 0)


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
TORCHRUN |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "none"}


def test_options_that_torchrun_decides(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    message = refused("--num-gpus", "2")
    assert "torchrun has started 4 processes already" in message
    assert "--nproc-per-node" in message
    if torch.cuda.device_count() < 2:
        assert "torchrun --nproc-per-node 2: this machine has" in refused(device="cuda")
    monkeypatch.delenv("MASTER_PORT")
    assert "without MASTER_PORT" in refused()


def test_a_cluster_that_sets_a_rank_by_itself_is_not_torchrun(monkeypatch):
    for name, value in TORCHRUN.items():
        if name != "TORCHELASTIC_RUN_ID":
            monkeypatch.setenv(name, value)
    seen = []
    launch_processes(seen.append, get_parser().parse_args([]), "cpu")
    assert [type(each) for each in seen] == [Namespace]


def test_cores_are_shared(monkeypatch):
    chosen = []
    monkeypatch.setattr(launching.torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(launching, "_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for processes in (1, 2, 3, 16):
        launching._main_in_process(lambda args: None, Namespace(), "cpu", processes)
    assert chosen == [4, 2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    launching._main_in_process(lambda args: None, Namespace(), "cpu", 2)
    assert chosen == [4, 2, 1]


@pytest.mark.parametrize(
    ("device", "available", "kept"),
    [("cpu", True, True), ("cpu", False, True), ("cuda", False, True), ("cuda", True, False)],
)
def test_memory_is_kept_by_processes_that_compute_on_the_cpu(
    monkeypatch, memory_kept, device, available, kept
):
    monkeypatch.setattr(launching.torch.cuda, "is_available", lambda: available)
    launching._main_in_process(lambda args: None, Namespace(), device, 1)
    assert memory_kept == [True] * kept


@pytest.mark.parametrize(
    ("code", "name", "expected"),
    [(143, None, 143), (-9, "SIGKILL", "process 3 of this machine was ended by SIGKILL")],
)
def test_status_of_a_process_that_ended(monkeypatch, code, name, expected):
    def fail(*args, **kwargs):
        raise ProcessExitedException("gone", 3, 77, exit_code=code, signal_name=name)

    monkeypatch.setattr(launching, "launch", fail)
    with pytest.raises(SystemExit) as caught:
        launch_processes(pytest.fail, get_parser().parse_args(["--num-gpus", "4"]), "cpu")
    assert caught.value.code == expected or str(caught.value).startswith(str(expected))


def test_no_group_outlasts_the_work(tmp_path):
    for number in range(2):  # what detectron2 remembers of the first job would be in the way
        store = f"file://{tmp_path}/store{number}"
        dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        comm.create_local_process_group(1)
        comm._get_global_gloo_group()
        launching.leave_groups()
        assert not dist.is_initialized()
        assert comm._LOCAL_PROCESS_GROUP is None
        assert comm._get_global_gloo_group.cache_info().currsize == 0
    launching.leave_groups()  # nothing is left to do
