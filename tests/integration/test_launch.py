"""The launch files in `scripts/`: two processes on one machine, on two hosts, and under SLURM."""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import slurm_cluster
import torch
from small_run import SMALL

from gitlight.runs import load_checkpoint

ROOT = Path(__file__).parent.parent.parent
RUN = ["configs/demo.yaml", *SMALL, "generator.name=mlp", "generator.hidden_size=8", "trainer.max_epochs=1"]
HOSTS = ("gitlight0", "gitlight1")


def environment(**more):
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "SLURM_"))}
    path = f"{Path(sys.executable).parent}:{plain['PATH']}"
    return {**plain, "PATH": path, "OMP_NUM_THREADS": "1", **more}


def start(*command, **more):
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def losses(run):
    with (run / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


@pytest.fixture(scope="module")
def of_one_process(tmp_path_factory):
    """Losses of the same run in a single process."""
    folder = tmp_path_factory.mktemp("alone")
    process = start(sys.executable, "train.py", *RUN, "trainer.devices=1", f"output_dir={folder / 'run'}")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    return losses(folder / "run")


def test_torchrun_on_one_machine(tmp_path, of_one_process):
    process = start("scripts/torchrun.sh", *RUN, f"output_dir={tmp_path / 'run'}", PROCESSES="2", MASTER_PORT="29417")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert losses(tmp_path / "run") == pytest.approx(of_one_process, rel=1e-5)


def test_processes_that_torchrun_starts_are_those_of_the_settings(tmp_path):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29419")
    process = start(*torchrun, "train.py", *RUN, "trainer.devices=1", f"output_dir={tmp_path / 'run'}")
    output, _ = process.communicate(timeout=200)
    assert process.returncode != 0
    assert "error: trainer.devices: torchrun started 2 processes, and trainer.devices=1" in output
    assert not (tmp_path / "run").exists()


def test_torchrun_shares_out_what_has_nothing_to_train(tmp_path):
    (tmp_path / "exact.yaml").write_text("generator: {name: exact}\ntrainer: {max_epochs: 1}\n")
    # More pairs than fits need: where they are underdetermined, rounding decides.
    run = [str(tmp_path / "exact.yaml"), *SMALL, "data.n_public_images=416", "data.image_size=16"]
    process = start(sys.executable, "train.py", *run, "trainer.devices=1", f"output_dir={tmp_path / 'one'}")
    assert process.wait(timeout=200) == 0, process.communicate()[0]
    process = start("scripts/torchrun.sh", *run, f"output_dir={tmp_path / 'two'}", PROCESSES="2", MASTER_PORT="29418")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert output.count("epoch 1/1") == 1, "one run of two processes, not two of one"
    one, two = (load_checkpoint(tmp_path / run / "checkpoints" / "last.ckpt") for run in ("one", "two"))
    for name, fitted in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], fitted, rtol=1e-6, atol=1e-6 * float(fitted.max()))


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sh"])
def test_what_is_asked_for_is_what_is_started(tmp_path, script):
    for name in ("python", "srun"):  # say what they are given; the number of GPUs is asked for first
        (tmp_path / name).write_text('#!/bin/sh\n[ "$1" = -c ] && echo 0 && exit\nprintf "%s\\n" "$@"\n')
        (tmp_path / name).chmod(0o755)
    settings = ["a config.yaml", "trainer.strategy=fsdp", "output_dir=runs/a b"]
    process = start(f"scripts/{script}", *settings, PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_NUM_NODES="2")
    output, _ = process.communicate(timeout=60)
    given = output.splitlines()
    assert [word for word in given if word in settings] == settings
    assert [word for word in given if word.startswith("trainer.strategy=")] == ["trainer.strategy=fsdp"]


@pytest.mark.parametrize(("starts", "begins_afresh"), [({}, True), ({"SLURM_RESTART_COUNT": "1"}, False)])
def test_a_job_begins_afresh_once(tmp_path, starts, begins_afresh):
    (tmp_path / "srun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    process = start("scripts/slurm.sh", "config.yaml", "trainer.resume=null", "output_dir=run", PATH=path, **starts)
    given = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 0, given
    assert "output_dir=run" in given
    resume = [word for word in given if word.startswith("trainer.resume=")]
    assert resume == ["trainer.resume=auto", *(["trainer.resume=null"] if begins_afresh else [])]


@pytest.fixture
def two_hosts():
    """Two network namespaces with a cable between them; names and the first one's address."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need iproute2 and root")
    made = []
    try:
        for number, host in enumerate(HOSTS):
            if subprocess.run(["ip", "netns", "add", host], capture_output=True).returncode:
                pytest.skip("this machine makes no network namespaces")
            made.append(host)
            if number == 0:
                continue
            cable = [
                "ip",
                "link",
                "add",
                "eth9",
                "netns",
                HOSTS[0],
                "type",
                "veth",
                "peer",
                "name",
                "eth9",
                "netns",
                host,
            ]
            if subprocess.run(cable, capture_output=True).returncode:
                pytest.skip("this machine makes no virtual cables")
        for number, host in enumerate(HOSTS):
            inside = ["ip", "-n", host]
            subprocess.run([*inside, "addr", "add", f"10.213.7.{number + 1}/24", "dev", "eth9"], check=True)
            for device in ("lo", "eth9"):
                subprocess.run([*inside, "link", "set", device, "up"], check=True)
        yield HOSTS, "10.213.7.1"
    finally:
        for host in made:
            subprocess.run(["ip", "netns", "delete", host], check=False)


@pytest.mark.slow
def test_torchrun_on_two_hosts(two_hosts, tmp_path, of_one_process):
    hosts, first = two_hosts
    processes = [
        start(
            *("ip", "netns", "exec", host, "scripts/torchrun.sh", *RUN, f"output_dir={tmp_path / 'run'}"),
            MACHINES="2", MACHINE=str(number), PROCESSES="1", MASTER_ADDR=first, GLOO_SOCKET_IFNAME="eth9",
        )
        for number, host in enumerate(hosts)
    ]  # fmt: skip
    for process in processes:
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output
    assert losses(tmp_path / "run") == pytest.approx(of_one_process, rel=1e-5)


@pytest.mark.parametrize(
    ("code", "state", "preempted", "requeued"),
    [
        (138, "RUNNING", "None", True),
        (143, "RUNNING", "None", False),
        (143, "RUNNING", "2026-11-28T17:40:00", True),
        (143, "CANCELLED", "2026-11-28T17:40:00", False),
        (143, None, None, False),
        (1, "RUNNING", "2026-11-28T17:40:00", False),
    ],
)
def test_slurm_requeues_a_job_that_stopped_in_time(tmp_path, code, state, preempted, requeued):
    shown = f"JobId=77 JobName=gitlight\\n   JobState={state} Reason=None\\n   PreemptTime={preempted}"
    show = f'printf "{shown}"' if state else "exit 1"  # what SLURM cannot tell changes no exit code
    asked = f'if [ "$1" = show ]; then {show}; else echo "$@" > {tmp_path}/asked; fi'
    for name, body in (("srun", f"exit {code}"), ("scontrol", asked)):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{environment()['PATH']}"
    process = start("scripts/slurm.sh", "configs/demo.yaml", PATH=path, SLURM_JOB_ID="77")
    output, _ = process.communicate(timeout=20)
    assert process.returncode == code, output
    assert (tmp_path / "asked").exists() == requeued
    assert not requeued or (tmp_path / "asked").read_text() == "requeue 77\n"


@pytest.fixture(scope="module")
def cluster():
    if why := slurm_cluster.missing():
        pytest.skip(why)
    # A socket's path is short.
    with tempfile.TemporaryDirectory(prefix="slurm") as folder:
        cluster = slurm_cluster.Cluster(Path(folder), environment())
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


def n_rows(run):
    return len(losses(run)) if (run / "metrics.csv").exists() else 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_slurm_on_two_machines(cluster, tmp_path, of_one_process):
    run = [*RUN, f"output_dir={tmp_path / 'run'}"]
    # Without a checkpoint a run begins.
    job = cluster.submit(ROOT, *run)
    assert cluster.end_of(job)["JobState"] == "COMPLETED", cluster.log(job)
    assert losses(tmp_path / "run") == pytest.approx(of_one_process, rel=1e-5)
    job = cluster.submit(ROOT, *run, "trainer.max_epochs=2")
    assert cluster.end_of(job)["JobState"] == "COMPLETED", cluster.log(job)
    assert n_rows(tmp_path / "run") == 2 * len(of_one_process)
    assert not (tmp_path / "run.1").exists()


INTERRUPTIONS = {"SIGUSR1": ("scancel", "--signal=USR1"), "SIGTERM": ("scontrol", "requeue")}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", INTERRUPTIONS)
def test_slurm_starts_a_job_again(cluster, tmp_path, of_one_process, name):
    """By the script after the warning, by SLURM itself where it is asked to; each time from where the run stopped."""
    folder = tmp_path / "run"
    epochs = 40
    job = cluster.submit(ROOT, *RUN, f"output_dir={folder}", f"trainer.max_epochs={epochs}")
    cluster.wait_for(lambda: n_rows(folder) > 2 * len(of_one_process))
    subprocess.run([*INTERRUPTIONS[name], job], env=cluster.environment, check=True)
    stopped = rf"{name}: stopped at step (\d+)"
    cluster.wait_for(lambda: re.search(stopped, cluster.log(job)))
    interrupted = n_rows(folder)
    assert interrupted < epochs * len(of_one_process)
    assert re.findall(stopped, cluster.log(job)) == [str(interrupted)], "what is logged is saved"
    ended = cluster.end_of(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), cluster.log(job)
    assert n_rows(folder) == epochs * len(of_one_process)
    assert not (tmp_path / "run.1").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_slurm_starts_a_job_again_that_another_was_more_urgent_than(cluster, tmp_path, of_one_process):
    """It ends within its grace time, and SLURM would leave it at that. Once cancelled it does not come back."""
    folder = tmp_path / "run"
    settings = [*RUN, f"output_dir={folder}", "trainer.max_epochs=5000"]
    job = cluster.submit(ROOT, *settings, partition="spare")
    cluster.wait_for(lambda: n_rows(folder) > 2 * len(of_one_process))
    urgent = ["sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null"]
    done = subprocess.run([*urgent, "--wrap=true"], env=cluster.environment, capture_output=True, text=True, check=True)
    assert cluster.end_of(done.stdout.strip())["JobState"] == "COMPLETED"
    (stopped_at,) = re.findall(r"SIGTERM: stopped at step (\d+)", cluster.log(job))
    cluster.wait_for(lambda: n_rows(folder) > int(stopped_at))
    subprocess.run(["scancel", job], env=cluster.environment, check=True)
    ended = cluster.end_of(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "1"), cluster.log(job)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_slurm_cancels_with_a_checkpoint(cluster, tmp_path, of_one_process):
    folder = tmp_path / "run"
    job = cluster.submit(ROOT, *RUN, f"output_dir={folder}", "trainer.max_epochs=5000")
    cluster.wait_for(lambda: n_rows(folder) > 2 * len(of_one_process))
    subprocess.run(["scancel", job], env=cluster.environment, check=True)
    assert cluster.end_of(job)["JobState"] == "CANCELLED"
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert saved == n_rows(folder)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_slurm_ends_a_job_that_lost_a_task(cluster, tmp_path, of_one_process):
    folder = tmp_path / "run"
    job = cluster.submit(ROOT, *RUN, f"output_dir={folder}", "trainer.max_epochs=5000")
    cluster.wait_for(lambda: n_rows(folder) > 2 * len(of_one_process))
    tasks = ["pgrep", "-f", rf"^\S*python train.py.*{re.escape(str(folder))}"]
    listed = subprocess.run(tasks, capture_output=True, text=True, check=True)
    one, _ = (int(number) for number in listed.stdout.split())
    os.kill(one, signal.SIGKILL)
    assert cluster.end_of(job)["JobState"] == "FAILED"
    assert "Killed" in cluster.log(job)
    assert not subprocess.run(tasks, capture_output=True, text=True).stdout, "the other ended, too"
    # What was saved before can be gone on from.
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] >= 2 * len(of_one_process)
