"""A Slurm of our own: a controller and two nodes, all on this machine."""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

PROGRAMS = (
  "munged",
  "slurmctld",
  "slurmd",
  "sbatch",
  "srun",
  "scancel",
  "scontrol",
  "squeue",
)
# Addresses as names, because JAX looks up the first node's name.
NODES = ("127.0.0.1", "127.0.0.2")
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
PlugStackConfig=/dev/null
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=5
KillWait=30
GresTypes=gpu
NodeName=127.0.0.[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] \
CPUs=16 Gres=gpu:8 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Cluster(NamedTuple):
  """A running Slurm.

  Attributes:
    environment: for its commands.
    processes: of the controller and of each node, by name.
    folder: its files.
  """

  environment: dict[str, str]
  processes: dict[str, subprocess.Popen[bytes]]
  folder: pathlib.Path

  def command(self, *words: str) -> str:
    """What a command of Slurm prints."""
    done = subprocess.run(
      words, env=self.environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout.strip()

  def answers(self) -> bool:
    """Whether the controller is up."""
    ping = ["scontrol", "ping"]
    done = subprocess.run(ping, env=self.environment, capture_output=True, check=False)
    return done.returncode == 0

  def job(self, job: str) -> dict[str, str]:
    """The fields of a job as `scontrol show job` names them."""
    words = self.command("scontrol", "--oneliner", "show", "job", job).split()
    return dict(word.split("=", 1) for word in words if "=" in word)

  def start(self, node: str) -> None:
    """Starts the daemon of a node, and waits until it may have jobs."""
    self._daemon(node, "slurmd", "-D", "-N", node)
    _await(lambda: self._is_ready(node))

  def lose(self, node: str) -> None:
    """Kills the daemon of a node and the steps that run there."""
    steps = f"slurmstepd-{node}"
    for process in pathlib.Path("/proc").glob("[0-9]*"):
      with contextlib.suppress(OSError):
        lines = (process / "cmdline").read_bytes().split(b"\0")
        environ = (process / "environ").read_bytes().split(b"\0")
        ours = f"SLURM_CONF={self.environment['SLURM_CONF']}".encode() in environ
        on_node = f"SLURMD_NODENAME={node}".encode() in environ
        if ours and (on_node or steps.encode() in lines):
          os.kill(int(process.name), signal.SIGKILL)
    self.processes.pop(node).kill()

  def _daemon(self, name: str, *words: str) -> None:
    with open(self.folder / f"{name}.log", "ab") as log:
      self.processes[name] = subprocess.Popen(
        words, env=self.environment, stdout=log, stderr=log, start_new_session=True
      )

  def _is_ready(self, node: str) -> bool:
    words = self.command("sinfo", "-hN", "-n", node, "-o", "%T").split()
    return bool(words) and words[0] in ("idle", "mixed", "allocated")


def missing() -> list[str]:
  """The programs of Slurm that are not installed."""
  return [program for program in PROGRAMS if shutil.which(program) is None]


@contextlib.contextmanager
def running(folder: pathlib.Path) -> Iterator[Cluster]:
  """Starts a Slurm whose files are in `folder`, and ends it with all of its jobs."""
  port, first, last = _free_ports()
  host = socket.gethostname().partition(".")[0]
  (folder / "state").mkdir(parents=True)
  conf = CONF.format(host=host, port=port, first=first, last=last, folder=folder)
  (folder / "slurm.conf").write_text(conf)
  # Without this key nobody may use this Slurm, although others may reach its ports.
  (folder / "munge.key").touch(mode=0o600)
  (folder / "munge.key").write_bytes(os.urandom(128))
  (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
  for gpu in range(8):
    (folder / f"gpu{gpu}").touch()
  environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
  cluster = Cluster(environment, {}, folder)
  try:
    files = ("pid", "log", "seed", "key")
    options = [f"--{name}-file={folder}/munge.{name}" for name in files]
    socket_option = f"--socket={folder}/munge.socket"
    cluster._daemon("munged", "munged", "-F", "--force", socket_option, *options)
    cluster._daemon("slurmctld", "slurmctld", "-D")
    _await((folder / "munge.socket").exists)
    _await(cluster.answers)
    for node in NODES:
      cluster.start(node)
    yield cluster
  finally:
    with contextlib.suppress(AssertionError):
      cluster.command("scancel", "--full", "--signal=KILL", "--user=root")
    for process in cluster.processes.values():
      process.terminate()
    for process in cluster.processes.values():
      process.wait(timeout=60)


def _await(done: Callable[[], bool]) -> None:
  deadline = time.monotonic() + 60
  while not done():
    assert time.monotonic() < deadline, "Slurm does not start; see its *.log"
    time.sleep(0.1)


def _free_ports() -> list[int]:
  """Three ports that nobody uses now, of which the last two follow each other."""
  while True:
    with contextlib.ExitStack() as sockets:
      ports = []
      for wanted in (0, 0, None):
        opened = sockets.enter_context(socket.socket())
        try:
          opened.bind(("", ports[-1] + 1 if wanted is None else wanted))
        except OSError:
          break
        ports.append(opened.getsockname()[1])
      else:
        return ports
