"""A run of the smoke profile on a SLURM cluster of one node, made for it: killed in the middle, resumed, compared.

``python tests/cluster/slurm.py [--until CHAPTER ...] [--cpus N]``. Debian's packages give the cluster; its daemons live
in a temporary folder and end with this script. The controller, Snakemake, is killed while trials run; the jobs go on; a
second call finishes what is missing. All metrics and trials then have to be those of a local run, but for times and
costs. Where the machine is not root's, or no Debian, one sentence says so and nothing is tested.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from semalign.lm.files import read_json  # noqa: E402

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PLUGINS = ("snakemake-executor-plugin-slurm==2.8.0", "snakemake-executor-plugin-slurm-jobstep==0.6.1")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "sinfo", "scontrol", "scancel", "srun")
"""What is called of these packages: by this file, by the plugins, and in the jobs."""
SPENT = frozenset(("cost", "seconds", "minutes", "hours", "memory"))
"""What a run spends differs from run to run: keys that have one of these as a word, or end in ``_s``, are left out."""
CONFIGURED = Path("/etc/slurm/slurm.conf")
"""Where commands look by themselves: the plugin takes SLURM_CONF, with all that SLURM sets, from what its jobs call."""
CONF = """\
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={port1}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
MinJobAge=300
ReturnToService=2
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str:
    """Why the cluster cannot be made here, as one sentence; empty where it can."""
    if os.geteuid() != 0:
        return "the SLURM test is skipped: it makes a cluster, for which it has to be root"
    if not shutil.which("apt-get"):
        return "the SLURM test is skipped: it makes a cluster from Debian's packages, and there is no apt-get"
    if CONFIGURED.exists():
        return (
            f"the SLURM test is skipped: {CONFIGURED} is there already, and this machine's cluster is not to be touched"
        )
    if not absent():
        return ""
    quiet = {
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.DEVNULL,
        "env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
    }
    subprocess.run(["apt-get", "update", "-qq"], **quiet)  # type: ignore[call-overload]
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES]
    if subprocess.run(install, **quiet).returncode:  # type: ignore[call-overload]
        return f"the SLURM test is skipped: apt-get cannot install {', '.join(PACKAGES)} here"
    if missing := absent():
        return f"the SLURM test is skipped: after installing its packages PATH has no {' and no '.join(missing)}"
    return ""


def absent() -> list[str]:
    """The programs that are needed and not found: of a half-made installation some are there."""
    return [name for name in PROGRAMS if not shutil.which(name)]


@contextlib.contextmanager
def cluster(folder: Path, cpus: int) -> Iterator[dict[str, str]]:
    """A one-node cluster whose files are in ``folder``; gives the environment in which its commands find it."""
    for part in ("state", "spool"):
        (folder / part).mkdir(parents=True)
    host = socket.gethostname().partition(".")[0]
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0)), two.bind(("127.0.0.1", 0))
        port, port1 = one.getsockname()[1], two.getsockname()[1]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20 - 512
    text = CONF.format(host=host, port=port, port1=port1, folder=folder, cpus=cpus, memory=memory)
    (folder / "slurm.conf").write_text(text)
    CONFIGURED.parent.mkdir(exist_ok=True)
    CONFIGURED.unlink(missing_ok=True)  # of a test that was killed: it points nowhere
    CONFIGURED.symlink_to(folder / "slurm.conf")
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    log = (folder / "daemons.log").open("w")
    munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}"]
    munged += [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")]
    apart = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]  # jobs end with their slurmd
    apart = apart if subprocess.run([*apart, "true"], stderr=subprocess.DEVNULL).returncode == 0 else []
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for command in (munged, ["slurmctld", "-D"], [*apart, "slurmd", "-D", "-N", host]):
            daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            time.sleep(1)
        until(lambda: idle(environment), 60, "the node does not become idle", folder)
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()
        log.close()
        CONFIGURED.unlink(missing_ok=True)


def asked(words: str, environment: dict[str, str]) -> str:
    """What a command of the cluster prints.

    Raises:
        RuntimeError: it failed, so that what it did not print means nothing; the message has what it complained of.
    """
    done = subprocess.run(words.split(), env=environment, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{words!r} ended with status {done.returncode}: {done.stderr.strip()}")
    return done.stdout.strip()


def idle(environment: dict[str, str]) -> bool:
    """Whether the node waits for jobs; not while its controller starts, which nobody can ask yet."""
    with contextlib.suppress(RuntimeError):
        return "idle" in asked("sinfo -h -o %T", environment)
    return False


def until(what: Any, seconds: float, otherwise: str, folder: Path) -> None:
    """Wait for something; what the daemons said is shown where it does not come."""
    end = time.monotonic() + seconds
    while not what():
        if time.monotonic() > end:
            sys.exit(f"{otherwise}:\n{(folder / 'daemons.log').read_text()[-3000:]}")
        time.sleep(0.5)


def controller(
    profile: Path, results: Path, targets: list[str], plugins: Path, environment: dict[str, str]
) -> list[str]:
    """Snakemake as ``book/rerun.md`` calls it, with what a cluster without accounting needs."""
    environment["PYTHONPATH"] = f"{ROOT}:{plugins}"
    return [
        sys.executable, "-m", "snakemake", *targets, "--profile", str(ROOT / "clusters/slurm"),
        "--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "5",
        "--slurm-logdir", str(results / "slurm"), "--latency-wait", "20", "--directory", str(ROOT),
        "--config", f"profile={profile}", f"results={results}",
    ]  # fmt: skip


def said_by_jobs(results: Path) -> str:
    """What the jobs of the cluster printed: of each the end, and what the project itself said was wrong."""

    def told(text: str) -> str:
        return "\n".join([*(line for line in text.splitlines() if line.startswith("semalign: ")), text[-2000:]])

    return "\n".join(f"-- {p}\n{told(p.read_text())}" for p in sorted((results / "slurm").rglob("*.log")))


def spent(key: str) -> bool:
    """Whether a key of json holds what a run spends, by its words: ``by_subject`` or ``peak_layer`` do not."""
    return key.endswith("_s") or not SPENT.isdisjoint(re.split(r"[^A-Za-z]+", key))


def same(one: Any, two: Any, where: str = "") -> list[str]:
    """Where two values from json differ, what was spent left aside."""
    if isinstance(one, dict) and isinstance(two, dict):
        keys = [k for k in {*one, *two} if not spent(k)]
        return [d for k in sorted(keys) for d in same(one.get(k), two.get(k), f"{where}.{k}")]
    if isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        return [d for i, (a, b) in enumerate(zip(one, two, strict=True)) for d in same(a, b, f"{where}[{i}]")]
    return [] if one == two else [f"{where}: {one!r:.60} and {two!r:.60}"]


def compared(local: Path, remote: Path) -> tuple[int, list[str]]:
    """How many files of metrics and of trials both runs have, and where they differ."""
    differences, count = [], 0
    names = {p.relative_to(r) for r in (local, remote) for p in (r / "metrics").glob("*.json")}
    names.discard(Path("metrics/90_cost.json"))  # which measures what a run spends
    names |= {p.relative_to(r) for r in (local, remote) for p in (r / "artefacts/trials").glob("*/*.json")}
    for name in sorted(names):
        missing = [str(r) for r in (local, remote) if not (r / name).exists()]
        differences += [f"{name} is not in {m}" for m in missing]
        if not missing:
            count += 1
            one, two = (read_json(r / name) for r in (local, remote))  # of metrics, not where and when they were made
            differences += [f"{name}{d}" for d in same(one.get("metrics", one), two.get("metrics", two))]
    return count, differences


def main() -> int:
    """Run it; the exit status is 0 where all is the same, or where the test cannot run here."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--until", nargs="*", default=[], help="chapters, by name; all of them by default")
    parser.add_argument("--cpus", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    if said := why_not():
        print(said)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the daemons end and their folder goes
    with tempfile.TemporaryDirectory(prefix="semalign-slurm-") as name:
        folder = Path(name)
        profile, local, remote = folder / "smoke.yaml", folder / "local", folder / "remote"
        smoke = yaml.safe_load((ROOT / "notebooks/profiles/smoke.yaml").read_text())
        profile.write_text(yaml.safe_dump({**smoke, "trial_jobs": True}))
        plugins = folder / "plugins"
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(plugins), *PLUGINS]
        if subprocess.run(install, stderr=subprocess.DEVNULL).returncode:
            print(f"the SLURM test is skipped: pip cannot install {' and '.join(PLUGINS)} here")
            return 0
        with cluster(folder / "cluster", given.cpus) as environment:
            targets = [f"notebook_{name}" for name in given.until] or ["notebooks"]
            command = controller(profile, remote, targets, plugins, environment)
            trials = remote / "artefacts/trials"
            print("== the first controller, killed after its first trial", flush=True)
            first = subprocess.Popen(command, env=environment, start_new_session=True)

            def begun() -> bool:
                return first.poll() is not None or any(trials.glob("*/*.json"))

            try:
                until(begun, 900, "no trial ends", folder / "cluster")
            except SystemExit:
                first.kill()
                raise
            if first.poll() is not None:
                print(f"the controller ended by itself with status {first.returncode} before a trial was there")
                print(said_by_jobs(remote))
                return 1
            os.killpg(first.pid, signal.SIGKILL)
            first.wait()
            running = asked("squeue -h -t running -o %i", environment).split()
            print(f"== killed; jobs that go on without it: {len(running)}", flush=True)
            until(lambda: not asked("squeue -h -o %i", environment), 900, "jobs do not end", folder / "cluster")
            kept = {path: path.stat().st_mtime_ns for path in trials.glob("*/*.json")}
            print(f"== the second controller, with {len(kept)} trials there", flush=True)
            if subprocess.run(command, env=environment).returncode:
                print(f"the resumed run failed\n{said_by_jobs(remote)}")
                return 1
            again = [p.name for p, t in kept.items() if p.stat().st_mtime_ns != t]
        print("== the same, locally", flush=True)
        here = [
            sys.executable, "-m", "snakemake", *targets, "--cores", str(given.cpus), "--nolock",
            "--directory", str(ROOT), "--rerun-triggers", "software-env",
            "--config", f"profile={profile}", f"results={local}",
        ]  # fmt: skip
        if subprocess.run(here, env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode:
            print("the local run failed")
            return 1
        count, differences = compared(local, remote)
        print(f"{count} files compared; {len(running)} jobs outlived the controller; trials made again: {again}")
        print("\n".join(differences) or "all of them the same, but for times and costs")
        return int(bool(differences or again or not running or not count))


if __name__ == "__main__":
    sys.exit(main())
