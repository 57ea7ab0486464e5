"""A SLURM of two machines that are both this one, for tests of `scripts/slurm.sh`."""

import os
import shutil
import socket
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo", "pgrep")
SETTINGS = """
ClusterName=gitlight
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MpiDefault=none
KillWait=60
NodeName=machine1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8
NodeName=machine2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=ALL Default=YES State=UP PriorityTier=1
PartitionName=spare Nodes=ALL State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL State=UP PriorityTier=2 PreemptMode=OFF
"""
"""Jobs of "urgent" take the machines from others, those of "spare" after a warning.

A requeued job waits until the credentials of its former steps have expired: two minutes by default."""


def missing() -> str | None:
    """Why no cluster can be started here."""
    if os.geteuid() != 0:
        return "SLURM's daemons need root"
    lacking = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"{lacking[0]} is not installed (Debian's slurm-wlm and munge)" if lacking else None


def free_ports(number):
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Cluster:
    """`slurmctld`, two `slurmd` and `munged`, with all that they write in one folder, until `stop`."""

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.folder = folder
        # The machines' names are known to SLURM alone.
        own = {"SLURM_CONF": str(folder / "slurm.conf"), "MASTER_ADDR": "127.0.0.1"}
        foreign = ("SBATCH_", "SRUN_", "SQUEUE_", "SINFO_", "MASTER_PORT")
        self.environment = {key: value for key, value in environment.items() if not key.startswith(foreign)} | own
        self.processes = []

    def start(self):
        (self.folder / "state").mkdir()
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        (self.folder / "munge.key").chmod(0o600)
        host = socket.gethostname().split(".")[0]
        text = SETTINGS.format(folder=self.folder, host=host, ports=free_ports(3))
        (self.folder / "slurm.conf").write_text(text)
        files = [f"--{name}={self.folder}/munge.{name.split('-')[0]}" for name in ("pid-file", "log-file", "seed-file")]
        munge = [f"--key-file={self.folder}/munge.key", f"--socket={self.folder}/munge.socket", *files]
        self.daemon("munged", "--foreground", "--force", "--origin=127.0.0.1", *munge)
        self.wait_for(lambda: (self.folder / "munge.socket").exists())
        self.daemon("slurmctld", "-D")
        for number in (1, 2):
            self.daemon("slurmd", "-D", "-N", f"machine{number}")
        self.wait_for(lambda: self.says("sinfo", "--noheader", "--format=%D %T") == "2 idle")

    def daemon(self, *command):
        name = f"{command[0]}{len(self.processes)}.log"
        with (self.folder / name).open("w") as log:
            self.processes.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=subprocess.STDOUT))

    def says(self, *command):
        """What one of SLURM's commands prints; nothing where it fails."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, timeout=60)
        return done.stdout.strip() if done.returncode == 0 else ""

    def is_empty(self):
        """Whether there is no job."""
        command = ("squeue", "--noheader")
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, timeout=60)
        return done.returncode == 0 and not done.stdout.strip()

    def wait_for(self, condition, seconds=120):
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                logs = "\n".join(
                    f"{file.name}: {file.read_text(errors='replace')[-2000:]}" for file in self.folder.glob("*.log")
                )
                raise TimeoutError(logs)
            time.sleep(0.2)

    def submit(self, root: Path, *arguments: str, partition="all"):
        """Give `scripts/slurm.sh` to two machines; returns the job's number."""
        log = f"--output={self.folder}/job-%j.log"
        options = [
            "--parsable",
            f"--partition={partition}",
            "--nodes=2",
            "--ntasks-per-node=1",
            "--cpus-per-task=2",
            "--time=10",
            log,
        ]
        command = ["sbatch", *options, "scripts/slurm.sh", *arguments]
        done = subprocess.run(command, cwd=root, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, job: str):
        """Its properties, by SLURM's names."""
        words = self.says("scontrol", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def end_of(self, job: str):
        """Wait until the job is over; gives its properties."""
        going_on = (None, "PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED")
        self.wait_for(lambda: self.job(job).get("JobState") not in going_on, 240)
        return self.job(job)

    def log(self, job: str):
        return (self.folder / f"job-{job}.log").read_text()

    def stop(self):
        try:
            # Jobs would outlive the daemons.
            self.says("scancel", "--user=root")
            self.wait_for(self.is_empty)
        finally:
            self.end_daemons()

    def end_daemons(self):
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
