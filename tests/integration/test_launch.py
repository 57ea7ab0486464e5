"""The launch files in `scripts/`: two processes on one machine, on two hosts, and under SLURM's environment."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import SMALL

ROOT = Path(__file__).parent.parent.parent
RUN = ["configs/demo.yaml", *SMALL, "generator.name=mlp", "generator.hidden_size=8", "trainer.max_epochs=1"]
HOSTS = ("gitlight0", "gitlight1")

# What `srun` does for two tasks on one machine.
SRUN = """#!/usr/bin/env bash
[ "$1" = --kill-on-bad-exit=1 ] || exit 9
shift
export SLURM_NTASKS=2 SLURM_NNODES=1 SLURM_NODEID=0 SLURM_NODELIST=localhost SLURM_JOB_ID=1234567
export SLURM_JOB_NAME=gitlight
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & done
status=0
for job in $(jobs -p); do wait "$job" || status=$?; done
exit $status
"""


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


@pytest.mark.parametrize(("code", "requeued"), [(138, True), (143, False), (1, False)])
def test_slurm_requeues_a_job_whose_time_is_over(tmp_path, code, requeued):
    for name, body in (("srun", f"exit {code}"), ("scontrol", f'echo "$@" > {tmp_path}/asked')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{environment()['PATH']}"
    process = start("scripts/slurm.sh", "configs/demo.yaml", PATH=path, SLURM_JOB_ID="77")
    output, _ = process.communicate(timeout=20)
    assert process.returncode == code, output
    assert (tmp_path / "asked").exists() == requeued
    assert not requeued or (tmp_path / "asked").read_text() == "requeue 77\n"


@pytest.mark.slow
def test_slurm_starts_and_continues(tmp_path, of_one_process):
    (tmp_path / "bin").mkdir()
    srun = tmp_path / "bin" / "srun"
    srun.write_text(SRUN)
    srun.chmod(0o755)
    path = f"{srun.parent}:{environment()['PATH']}"
    slurm = {"PATH": path, "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NUM_NODES": "1"}
    run = [*RUN, f"output_dir={tmp_path / 'run'}"]
    # Without a checkpoint a run begins.
    process = start("scripts/slurm.sh", *run, **slurm)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert losses(tmp_path / "run") == pytest.approx(of_one_process, rel=1e-5)
    process = start("scripts/slurm.sh", *run, "trainer.max_epochs=2", **slurm)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert len(losses(tmp_path / "run")) == 2 * len(of_one_process)
    assert not (tmp_path / "run.1").exists()
