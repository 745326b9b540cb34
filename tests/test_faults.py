"""A run that cannot lose work: processes killed, stopped and frozen, reads that hang, full disks, bad files.

`python -m pytest` runs a short form of each; `python -m pytest -m long tests/test_faults.py` the long one.
"""

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, Script, children, is_running, tone
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pretrain import SHORT, losses, our_lines, read_log, start_of
from torch.distributed.run import parse_args

import evaluate
import pretrain
from data import AudioDataset, InputError, Manifest, load_audio
from evaluate import StopRequest, newest_checkpoint, save_checkpoint
from model import CheckpointError, load_checkpoint

LONG = pytest.mark.long
RUN = [*SHORT, "--data", ROOT / "extras" / "demo" / "pretrain.tsv", "--clip_frames", 48]


def digest(out_dir: Path, name: str = "last.pt") -> str:
    """Hash of everything a checkpoint says about student, teacher, optimizer and scaler."""
    state = load_checkpoint(out_dir / name)
    total = hashlib.sha256()

    def add(value):
        if isinstance(value, dict):
            for key in value:
                total.update(repr(key).encode())
                add(value[key])
        elif isinstance(value, list):
            for item in value:
                add(item)
        elif isinstance(value, torch.Tensor):
            total.update(value.contiguous().numpy().tobytes())
        else:
            total.update(repr(value).encode())

    add({key: state[key] for key in ("step", "student", "teacher", "optimizer", "scaler")})
    return total.hexdigest()


class Job(Script):
    """A script, under torchrun if there are several processes, with all output in one file.

    With a port, one of two nodes of so many processes each.
    """

    def __init__(
        self, folder: Path, *args, processes: int = 2, restarts: int = 0, program: str | Path = "pretrain.py",
        port: int = 0, output: str = "output.txt", **environment,
    ):  # fmt: skip
        self.output = folder / output
        self.processes = processes
        node = ["--standalone"]
        if port:
            node = ["--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}"]
        torchrun = (*node, f"--max_restarts={restarts}")
        command = [ROOT / program, *args]
        super().__init__(command, folder, self.output, self.output, processes, torchrun, **environment)

    def ranks(self) -> list[int]:
        """Process numbers of the training processes, by rank."""
        return [self.pid] if self.processes == 1 else children(self.pid)

    def wait_for(self, condition, seconds: float = 180) -> bool:
        """True as soon as the condition holds, False if the job ends first."""
        end = time.time() + seconds
        while not condition():
            if self.poll() is not None:
                return False
            assert time.time() < end, self.text()
            time.sleep(0.01)
        return True

    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ""


def last_step(out_dir: Path) -> int:
    log = read_log(out_dir) if (out_dir / "log.jsonl").exists() else []
    return max((line["step"] for line in log), default=0)


def saved_step(out_dir: Path) -> int:
    return load_checkpoint(newest_checkpoint(out_dir))["step"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# --- processes --------------------------------------------------------------------------------------------

GAP = 12  # updates between kills


@pytest.fixture(scope="module")
def uncut(tmp_path_factory):
    """Run folder of a two-process run of so many updates that nothing has disturbed: uncut(updates)."""
    folder = tmp_path_factory.mktemp("uncut")

    def run(updates: int) -> Path:
        out_dir = folder / str(updates)
        if not out_dir.exists():
            assert Job(folder, *RUN, "--updates", updates, "--out_dir", out_dir).wait(600) == 0
        return out_dir

    return run


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=LONG)])
def test_killed_at_random_moments_it_ends_bit_identical(tmp_path, uncut, kills):
    """SIGKILL to a random rank or to all processes, at a random update or while starting; every time with
    another number of loader threads, in mid-epoch, between two checkpoints. No process shows a traceback."""
    updates = GAP * (kills + 1)
    rng = random.Random(kills)
    cut = tmp_path / "cut"
    args = [*RUN, "--updates", updates, "--out_dir", "cut"]
    for kill in range(kills):
        step = GAP * kill + rng.randint(GAP // 2, GAP)
        other = ["--workers", rng.choice([0, 1, 4]), "--save_every", rng.choice([5, 7])]
        job = Job(tmp_path, *args, *other)
        if kill % 4 == 3:
            time.sleep(rng.uniform(0.2, 3))
        else:
            assert job.wait_for(lambda step=step: last_step(cut) >= step)
        ranks = job.ranks()
        if kill % 3 == 1 or not ranks:
            job.kill()
        else:
            os.kill(rng.choice(ranks), signal.SIGKILL)
        assert job.wait(120) != 0
        assert not any(map(is_running, ranks))
    step = saved_step(cut)
    assert 0 < step < updates
    last = Job(tmp_path, *args)
    assert last.wait(600) == 0
    assert f"cut, from update {step}: 2 x cpu, torch.float32\n" in last.text()
    assert our_lines(last.text()) == []
    whole = uncut(updates)
    assert digest(cut) == digest(whole)
    assert losses(cut) == losses(whole)
    assert [line["step"] for line in read_log(cut)] == list(range(1, updates + 1))
    print(f"\n{kills} of {kills} kills survived, bit-identical after {updates} updates")


@pytest.mark.parametrize("number, rank", [
    (signal.SIGTERM, "all"), (signal.SIGUSR1, 1),
    *(pytest.param(number, rank, marks=LONG) for number, rank in (
        (signal.SIGTERM, 0), (signal.SIGTERM, 1), (signal.SIGINT, 0), (signal.SIGINT, 1),
        (signal.SIGINT, "all"), (signal.SIGUSR1, 0), (signal.SIGUSR1, "all"),
    )),
])  # fmt: skip
def test_a_signal_to_any_rank_stops_all_after_the_same_update(tmp_path, number, rank):
    """What was logged is saved, and the exit status of every process is 128 + the signal's number."""
    args = [*RUN, "--updates", 4000, "--out_dir", "run", "--save_every", 10_000, "--workers", 1]
    job = Job(tmp_path, *args)
    assert job.wait_for(lambda: last_step(tmp_path / "run") >= 5)
    seen = last_step(tmp_path / "run")
    ranks = job.ranks()
    assert len(ranks) == 2
    assert not [loader for pid in ranks for loader in children(pid)]  # these are threads
    for pid in ranks if rank == "all" else [ranks[rank]]:
        os.kill(pid, number)
    assert job.wait(120) != 0
    step = saved_step(tmp_path / "run")
    reasons = ["another process stops", f"stopped by {number.name}; the same command resumes"]
    if rank != "all":  # else either process may be the first to notice
        reasons = [reasons[1 - rank]]
    assert any(f"update {step}: {why}" in job.text() for why in reasons)
    exits = [int(status) for status in re.findall(r"exitcode +: (-?\d+)", job.text())]
    assert len(exits) == 2
    assert 128 + number in exits
    assert set(exits) <= {128 + number, -signal.SIGTERM}  # torchrun may end the slower
    assert seen <= step == last_step(tmp_path / "run") < 4000
    assert our_lines(job.text()) == []


def test_a_signal_while_the_processes_agree_is_not_lost(tmp_path):
    """It comes too late for this agreement, so that all stop after the next update."""
    body = """
import torch.distributed as dist
real = dist.all_reduce
seen = []
def all_reduce(x, op=dist.ReduceOp.SUM, **options):
    if op == dist.ReduceOp.MAX:
        seen.append(op)
        if len(seen) == 5 and rank == 0:
            signal.raise_signal(signal.SIGTERM)
    return real(x, op, **options)
dist.all_reduce = all_reduce
"""
    job = Job(tmp_path, *RUN, "--updates", 40, "--out_dir", "run", program=start_of(tmp_path, body))
    assert job.wait(120) != 0
    assert "update 6: stopped by SIGTERM" in job.text()
    assert saved_step(tmp_path / "run") == 6 == last_step(tmp_path / "run")


def test_a_stopped_run_goes_on_bit_for_bit_with_accumulation_and_packed_data(tmp_path, script):
    demo = ROOT / "extras" / "demo" / "pretrain.tsv"
    root, *lines = demo.read_text().splitlines()[:101]
    (tmp_path / "some.tsv").write_text("\n".join([str((demo.parent / root).resolve()), *lines]) + "\n")
    script("extras/prepare.py", "pack", "some.tsv", "packed.tsv")
    args = [*RUN, "--data", "packed.tsv", "--accumulate", 2, "--updates", 30]
    script("pretrain.py", *args, "--out_dir", "whole")
    job = Job(tmp_path, *args, "--out_dir", "cut", processes=1)
    assert job.wait_for(lambda: last_step(tmp_path / "cut") >= 10)
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait(120) == 128 + signal.SIGTERM
    step = saved_step(tmp_path / "cut")
    said = script("pretrain.py", *args, "--out_dir", "cut", "--workers", 4).stdout
    assert said.startswith(f"cut, from update {step}: 1 x cpu")
    assert 10 <= step < 30
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")


def test_going_on_with_another_number_of_processes(tmp_path, train):
    """Two processes that accumulate, then one that does not: the curve of one from the beginning, to 1e-5."""
    args = [*RUN, "--updates", 20, "--save_every", 5]
    assert train(*args, "--out_dir", "whole") == 0
    job = Job(tmp_path, *args, "--out_dir", "cut", "--accumulate", 2)
    assert job.wait_for(lambda: last_step(tmp_path / "cut") >= 6)
    job.kill()
    assert 5 <= saved_step(tmp_path / "cut") < 20
    assert train(*args, "--out_dir", "cut") == 0
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


@pytest.mark.parametrize("patience", [0, pytest.param(120, marks=LONG)])
def test_a_frozen_rank_ends_the_job(tmp_path, patience):
    """The others give up after --timeout. Then torchrun takes 30 s to kill the one that does not answer; the
    short form does that itself."""
    job = Job(tmp_path, *RUN, "--updates", 4000, "--out_dir", "run", "--timeout", 0.05, "--save_every", 5)
    assert job.wait_for(lambda: last_step(tmp_path / "run") >= 6)
    first, frozen = job.ranks()
    os.kill(frozen, signal.SIGSTOP)
    assert job.wait_for(lambda: not is_running(first), seconds=30)
    if not patience:
        os.kill(frozen, signal.SIGKILL)
    assert job.wait(patience or 20) != 0
    assert not is_running(frozen)
    assert saved_step(tmp_path / "run") >= 5


def two_nodes(folder: Path, *args) -> list[Job]:
    """A job of two nodes with two processes each, both of this machine."""
    port = free_port()
    return [Job(folder, *args, port=port, output=f"node {node}.txt") for node in range(2)]


@LONG
@pytest.mark.parametrize("killed", [0, 1])
def test_two_nodes_go_on_when_one_is_lost(tmp_path, train, killed):
    """It takes all its processes with it, and the other ends by itself, within --timeout. Both started again
    end where four processes do that nothing has disturbed, bit for bit; which is the curve of one."""
    args = [*RUN, "--updates", 2 * GAP, "--save_every", 7]
    assert Job(tmp_path, *args, "--out_dir", "whole", processes=4).wait(300) == 0
    assert train(*args, "--out_dir", "one") == 0
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    nodes = two_nodes(tmp_path, *args, "--out_dir", "cut", "--timeout", 0.5)
    assert nodes[0].wait_for(lambda: last_step(tmp_path / "cut") >= GAP)
    nodes[killed].kill()
    assert nodes[1 - killed].wait(90) != 0
    step = saved_step(tmp_path / "cut")
    assert 0 < step < 2 * GAP
    assert step % 7 == 0
    again = two_nodes(tmp_path, *args, "--out_dir", "cut")
    assert [node.wait(300) for node in again] == [0, 0]
    assert f"cut, from update {step}: 4 x " in again[0].text() + again[1].text()
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


@LONG
def test_torchrun_restarts_the_job_by_itself(tmp_path, uncut):
    updates = 3 * GAP
    job = Job(tmp_path, *RUN, "--updates", updates, "--save_every", 5, "--out_dir", "cut", restarts=2)
    for rank, step in enumerate((GAP, 2 * GAP)):
        assert job.wait_for(lambda step=step: last_step(tmp_path / "cut") >= step)
        os.kill(job.ranks()[rank], signal.SIGKILL)
        assert job.wait_for(lambda step=step: last_step(tmp_path / "cut") < step)
    assert job.wait(300) == 0
    assert digest(tmp_path / "cut") == digest(uncut(updates))


def test_two_runs_in_one_folder_are_refused(tmp_path, train):
    """By a lock that ends with its process, however that ends."""
    args = [*RUN, "--updates", 4000, "--save_every", 1, "--out_dir", "run"]
    job = Job(tmp_path, *args, processes=1)
    assert job.wait_for(lambda: last_step(tmp_path / "run") >= 1)
    with pytest.raises(InputError, match="another process is running in run: wait for it"):
        train(*args)
    step = last_step(tmp_path / "run")
    assert job.wait_for(lambda: last_step(tmp_path / "run") > step)  # it does not notice
    job.kill()
    with pytest.raises(InputError, match="run is another run"):
        train(*args, "--seed", 2)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EACCES, errno.EAGAIN])
def test_a_file_system_without_locks_is_warned_of(tmp_path, train, capsys, monkeypatch, number):
    """Only what says that another process has the lock stops a run."""

    def lockf(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    args = [*RUN, "--updates", 1, "--warmup", 0, "--out_dir", "run"]
    if number in (errno.EACCES, errno.EAGAIN):
        with pytest.raises(InputError, match="^another process is running in run: wait for it$"):
            train(*args)
    else:
        assert train(*args) == 0
        assert last_step(tmp_path / "run") == 1
        warning = "WARNING: run cannot be locked: start only one run in it\n"
        assert capsys.readouterr().err.count(warning) == 1


# --- batch systems and launchers --------------------------------------------------------------------------


@pytest.mark.parametrize("delays", [
    (0, 0.1, 0.8), pytest.param([0.8 * i / 9 for i in range(10)], marks=LONG),
])  # fmt: skip
def test_a_batch_system_signals_torchrun_and_its_processes(tmp_path, delays):
    """As Slurm does: SIGTERM to all, torchrun last, which signals its processes again. Every run is saved and
    no process is left over, whenever that comes."""
    args = [*RUN, "--updates", 4000, "--save_every", 10_000, "--out_dir"]
    for delay in delays:
        out_dir = tmp_path / f"run{delay}"
        job = Job(tmp_path, *args, out_dir, output=f"output{delay}.txt")
        assert job.wait_for(lambda out_dir=out_dir: last_step(out_dir) >= 3)
        seen = last_step(out_dir)
        ranks = job.ranks()
        for pid in ranks:
            os.kill(pid, signal.SIGTERM)
        time.sleep(delay)
        with contextlib.suppress(ProcessLookupError):
            os.kill(job.pid, signal.SIGTERM)
        assert job.wait(60) != 0
        assert not any(map(is_running, ranks))
        assert seen <= saved_step(out_dir) == last_step(out_dir) < 4000
        assert our_lines(job.text()) == []


def test_a_later_signal_ends_the_process_at_once(monkeypatch):
    """A repeat within ten seconds is the same request."""
    now = [100.0]
    ends = []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(os, "_exit", ends.append)
    request = StopRequest()
    assert request.number == 0
    request.note(signal.SIGTERM, None)
    for second in (0.0, 3.0, 9.9):
        now[0] = 100 + second
        request.note(signal.SIGUSR1, None)
    assert request.number == signal.SIGTERM
    assert ends == []
    now[0] = 110.1
    request.note(signal.SIGINT, None)
    assert ends == [128 + signal.SIGINT]


def test_slurm_sh_starts_a_run_and_requeues_what_the_time_limit_stops(tmp_path):
    text = (ROOT / "extras" / "slurm.sh").read_text()
    assert len(text.splitlines()) == 15
    assert re.search(r"^#SBATCH .*--signal=TERM@120", text, re.M)
    assert re.search(r"^#SBATCH .*--requeue", text, re.M)
    if not shutil.which("bash"):
        pytest.skip("needs bash")
    assert subprocess.run(["bash", "-n", ROOT / "extras" / "slurm.sh"]).returncode == 0
    commands = dict(srun='printf "%s\\n" "$@" > srun.txt; exit $STATUS', scontrol='echo "$@" >> scontrol.txt')
    for name, body in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = os.environ | dict(
        PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_ID="7", SLURM_NNODES="2", SLURM_JOB_NODELIST="a,b"
    )  # fmt: skip
    requeued = []
    for status, left in ((1, 100), (1, 1000), (0, 100)):  # exit status of the run, seconds to the time limit
        (tmp_path / "scontrol.txt").write_text("")
        env |= dict(STATUS=str(status), SLURM_JOB_END_TIME=str(int(time.time()) + left))
        command = ["bash", ROOT / "extras" / "slurm.sh"]
        command += ["finetune.py", "--data", "a b.tsv", "--preset", "own"]
        subprocess.run(command, cwd=tmp_path, env=env, timeout=30)
        requeued.append("requeue 7" in (tmp_path / "scontrol.txt").read_text())
    assert requeued == [True, False, False]
    program, *argv = (tmp_path / "srun.txt").read_text().splitlines()
    args = parse_args(argv)
    assert program == "torchrun"
    assert (args.nnodes, args.rdzv_backend, args.rdzv_id) == ("2", "c10d", "7")
    assert "SIGUSR1" in args.signals_to_handle
    assert args.training_script == "finetune.py"
    assert args.training_script_args == ["--data", "a b.tsv", "--preset", "own"]


SCRIPTS = {
    "pretrain.py": [*SHORT, "--data", "manifest.tsv", "--out_dir", "run"],
    "finetune.py": [
        *"--preset own --model tiny --init scratch --clip_frames 64 --batch_size 8 --updates 3".split(),
        *"--data manifest.tsv --eval_data manifest.tsv --min_samples 1600 --out_dir tuned".split(),
    ],
    "evaluate.py": ["classifier.pt", "manifest.tsv"],
    "extras/prepare.py": ["stats", "manifest.tsv"],
}


def test_launchers_that_start_too_few_processes_are_told_of(classifier):
    """WORLD_SIZE without the other processes: one line that names them within --timeout; nothing is made."""
    whole = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    others = "could not connect to the other 1 processes of WORLD_SIZE (torchrun starts them): "
    cases = [(name, whole | dict(RANK="0"), others) for name in ("pretrain.py", "finetune.py", "evaluate.py")]
    cases.append(("pretrain.py", whole | dict(RANK="1"), others))
    cases.append(("evaluate.py", dict(WORLD_SIZE="2"), others))
    before = {path.name for path in classifier.iterdir()}
    jobs = []
    for i, (name, env, _) in enumerate(cases):
        command = [ROOT / name, *SCRIPTS[name], "--timeout", 0.03]
        files = (classifier / f"out{i}", classifier / f"err{i}")
        jobs.append(Script(command, classifier, *files, MASTER_PORT=str(free_port()), **env))
    start = time.time()
    assert [job.wait(60) for job in jobs] == [1] * len(jobs)
    assert time.time() - start < 0.03 * 60 + 5 + 15
    for i, (name, _, message) in enumerate(cases):
        (line,) = (classifier / f"err{i}").read_text().splitlines()
        assert line.startswith(f"{name}: {message}")
        assert len(line) > len(f"{name}: {message}")
    assert {path.name for path in classifier.iterdir() if not path.name.startswith(("out", "err"))} == before


@pytest.mark.parametrize("world", ["1", "2"])
def test_a_script_for_one_process_refuses_others_at_once(monkeypatch, world):
    monkeypatch.setenv("WORLD_SIZE", world)
    if world == "1":
        assert evaluate.init_distributed(alone=True)[:2] == (0, 1)
    else:
        said = "^this needs one process, but WORLD_SIZE is 2: start it without torchrun$"
        with pytest.raises(InputError, match=said):
            evaluate.init_distributed(alone=True)


@pytest.mark.parametrize("name, args", [
    ("extras/listen.py", ["classifier.pt", "clip 0.wav"]), ("extras/compare.py", []),
])  # fmt: skip
def test_scripts_for_one_process_refuse_others(classifier, script, name, args):
    result = script(name, *args, check=False, WORLD_SIZE="2", RANK="0")
    assert result.returncode == 1
    said = "this needs one process, but WORLD_SIZE is 2: start it without torchrun"
    assert result.stderr == f"{Path(name).name}: {said}\n"


def test_without_what_windows_and_macos_lack(classifier, script):
    """File locks, SIGUSR1, the number of cores that a process may use, glibc: training and probes work."""
    body = """
sys.modules["fcntl"] = None
del signal.SIGUSR1, os.sched_getaffinity
sys.platform = "darwin"
"""
    probes = ["--probe_train", "manifest.tsv", "--probe_test", "manifest.tsv"]
    flags = ["--updates", 3, "--clip_frames", 48, "--model", "tiny", "--out_dir", "run", *probes]
    demo = ROOT / "extras" / "demo"
    for manifest, name in (("train.tsv", "manifest.tsv"), ("test.tsv", "test.tsv")):
        lines = (demo / manifest).read_text().splitlines()
        lines[0] = str((demo / lines[0]).resolve())
        (classifier / name).write_text("\n".join(lines[:20]) + "\n")
    said = script(start_of(classifier, body), "--preset", "demo", *flags).stdout
    assert "done: 3 updates" in said
    said = script(start_of(classifier, body), "--preset", "demo", *flags).stdout
    assert said.startswith("run, from update 3")
    result = script(start_of(classifier, body, "evaluate.py"), "run", "manifest.tsv", "manifest.tsv")
    assert 0 <= json.loads(result.stdout)["probe_linear"] <= 1


# --- reads ------------------------------------------------------------------------------------------------


def test_loader_threads_leave_the_training_thread_its_own(tmp_path):
    """Each has one OpenMP thread, and the thread that trains keeps its two, whether it has worked before or
    not. This takes a new process: in a copy of one the numbers are no longer shared."""
    (tmp_path / "threads.py").write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from data import Clip, build_loader

class Clips:
    source = "clips"
    n_frames = 98
    found = set()

    def __getitem__(self, item):
        self.found.add(torch.get_num_threads())
        return Clip(torch.zeros(9_000), item, "")

for _ in range(2):
    n_batches = len(list(build_loader(Clips(), [[item] for item in range(8)], 3)))
    torch.randn(300, 300) @ torch.randn(300, 300)
    print(n_batches, Clips.found, torch.get_num_threads())
""")
    run = dict(cwd=tmp_path, capture_output=True, text=True, timeout=120)
    env = os.environ | dict(OMP_NUM_THREADS="2")
    done = subprocess.run([sys.executable, "threads.py"], env=env, **run)
    assert done.stdout == "8 {1} 2\n8 {1} 2\n", done.stderr


HANGS = """
import soundfile
real = soundfile.SoundFile.read
n_read = []
def read(*args, **options):
    n_read.append(1)
    if rank == {rank} and len(n_read) > {reads}:
        open("hangs", "w").close()
        threading.Event().wait()
    return real(*args, **options)
soundfile.SoundFile.read = read
"""


def test_a_read_that_hangs_ends_every_script(classifier):
    """Within --timeout, in one line that names what is read, with exit status 1; also among two processes,
    whichever of them it is that reads, and none is left over."""
    pretrain = ("pretrain.py", SCRIPTS["pretrain.py"])
    probe = ("evaluate.py", ["classifier.pt", "manifest.tsv", "manifest.tsv"])
    pack = ("extras/prepare.py", ["pack", "manifest.tsv", "packed.tsv"])
    cases = [(1, 0, 0.03, name, args) for name, args in (*SCRIPTS.items(), probe, pack)]
    cases += [(2, 0, 0.1, *pretrain), (2, 1, 0.15, *pretrain)]
    jobs = []
    for i, (processes, rank, timeout, name, args) in enumerate(cases):
        start = start_of(classifier, HANGS.format(rank=rank, reads=0), name)
        more = ["--timeout", timeout, "--workers", 1]
        if name == "pretrain.py":
            more += ["--out_dir", f"run {i}"]
        jobs.append(Job(classifier, *args, *more, processes=processes, program=start, output=f"{i}.txt"))
    assert jobs[-1].wait_for(lambda: len(jobs[-1].ranks()) == 2)
    ranks = jobs[-1].ranks()
    assert [job.wait(90) for job in jobs] == [1] * len(jobs)
    assert not any(map(is_running, ranks))
    for job, (_, _, timeout, name, args) in zip(jobs, cases):
        seconds = {0.03: 2, 0.1: 5, 0.15: 8}[timeout]
        said = f"{Path(name).name}: no batch for {seconds} s: reading manifest.tsv hangs"
        if args[0] == "pack":
            said = "prepare.py: a file has not been read in 2 s"
        assert our_lines(job.text()) == [said]


def test_a_stop_does_not_wait_for_a_read_that_hangs(folder):
    """Batches that have been read are trained on; the thread that hangs is not waited for."""
    body = HANGS.format(rank=0, reads=16) + """
import model
real_loss = model.ufo_loss
calls = []
def ufo_loss(*args):
    calls.append(1)
    if len(calls) == 2:
        signal.raise_signal(signal.SIGTERM)
    return real_loss(*args)
model.ufo_loss = ufo_loss
"""
    args = [*SCRIPTS["pretrain.py"], "--workers", 1]
    job = Job(folder, *args, processes=1, program=start_of(folder, body))
    assert job.wait(60) == 128 + signal.SIGTERM
    assert (folder / "hangs").exists()
    assert "update 2: stopped by SIGTERM" in job.text()
    assert saved_step(folder / "run") == 2


def test_a_later_signal_ends_a_run_whose_read_hangs(folder):
    """The first asks for the end of the update, which does not come; one that is repeated within ten seconds
    is the same request."""
    body = """
import types
import soundfile, evaluate
now = [0.0]
evaluate.time = types.SimpleNamespace(**vars(time))
evaluate.time.monotonic = lambda: now[0]
def read(*_, **__):
    for second in (0.0, 9.9):
        now[0] = second
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
    open("alive", "w").close()
    now[0] = 10.1
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait()
soundfile.SoundFile.read = read
"""
    job = Job(folder, *SCRIPTS["pretrain.py"], processes=1, program=start_of(folder, body))
    assert job.wait(60) == 128 + signal.SIGTERM
    assert (folder / "alive").exists()
    assert our_lines(job.text()) == []


def test_a_pipe_is_no_audio_file(folder):
    """Opening one would wait for whoever writes to it."""
    (folder / "clip 3.wav").unlink()
    os.mkfifo(folder / "clip 3.wav")
    clip = AudioDataset(folder / "manifest.tsv")[3]
    assert clip.problem == "clip 3.wav\tno such file"
    assert clip.item == 4


# --- the log ----------------------------------------------------------------------------------------------


def test_a_run_goes_on_whatever_its_log_holds(tmp_path, train):
    """Lines behind the checkpoint are cut and logged again; those before it are not read."""
    args = [*RUN, "--updates", 12, "--save_every", 4, "--out_dir"]
    assert train(*args, "whole") == 0
    whole = (tmp_path / "whole" / "log.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (tmp_path / "whole" / "last.pt").unlink()  # previous.pt is that of update 8
    spoilt = b"x" * (len(lines[0]) - 1) + b"\n"
    damaged = {
        "foreign line": whole + b"lr 3\n",
        "half a line": whole + b'{"step": 5, "lo',
        "zeros": whole + bytes(4096),
        "first line": spoilt + b"".join(lines[1:]),
        "cut": b"".join(lines[:9]),
        "gone": b"",
    }
    for name, content in damaged.items():
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        log = tmp_path / name / "log.jsonl"
        log.write_bytes(content)
        if not content:
            log.unlink()
        assert train(*args, name) == 0
        found = log.read_bytes().splitlines(keepends=True)
        kept = {"gone": [], "first line": [spoilt, *lines[1:8]]}.get(name, lines[:8])
        assert found[:-4] == kept, name
        for ours, theirs in zip(found[-4:], lines[8:], strict=True):
            assert json.loads(ours)["step"] == json.loads(theirs)["step"]
            assert json.loads(ours)["loss"] == json.loads(theirs)["loss"]


def test_a_line_that_a_full_disk_cut_spoils_no_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = pretrain.Run(pretrain.PretrainConfig(data="x.tsv", out_dir="."))
    run.log(step=1)
    with open("log.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    run.log(step=3)
    run.log(step=4)
    lines = ['{"step": 1}', '{"step": 2, "lo', '{"step": 3}', '{"step": 4}']
    assert (tmp_path / "log.jsonl").read_text().splitlines() == lines


def test_a_run_that_begins_anew_begins_its_log_anew(tmp_path, train):
    """What is left of a run that was killed before its first checkpoint."""
    args = [*RUN, "--updates", 2, "--warmup", 1, "--out_dir", "run"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").touch()
    (tmp_path / "run" / "log.jsonl").write_text('{"step": 1, "loss": 3}\n{"step": 2, "l')
    assert train(*args) == 0
    assert [line["step"] for line in read_log(tmp_path / "run")] == [1, 2]


# --- checkpoints ------------------------------------------------------------------------------------------


def make_checkpoints(folder: Path) -> None:
    """last.pt of step 2 and previous.pt of step 1."""
    for step in (1, 2):
        save_checkpoint(folder / "last.pt", step=step, student={"w": torch.randn(300, 300)})


@pytest.mark.parametrize("n", [150, pytest.param(2000, marks=LONG)])
def test_flipped_and_truncated_checkpoints_are_never_taken_for_good(tmp_path, n):
    make_checkpoints(tmp_path)
    good = (tmp_path / "last.pt").read_bytes()
    expected = load_checkpoint(tmp_path / "last.pt")
    rng = random.Random(0)
    refused = 0
    for _ in range(n):
        damaged = bytearray(good)
        if rng.random() < 0.3:
            del damaged[rng.randrange(len(good)) :]
        else:
            for _ in range(rng.choice([1, 1, 8])):
                damaged[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        (tmp_path / "damaged.pt").write_bytes(damaged)
        try:
            state = load_checkpoint(tmp_path / "damaged.pt")
        except CheckpointError as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        assert state["step"] == expected["step"]
        assert torch.equal(state["student"]["w"], expected["student"]["w"])
    assert refused > 0.9 * n  # a flip in a zip's date or padding changes nothing


@pytest.mark.parametrize("how", ["truncated", "flipped", "empty", "missing"])
def test_the_previous_checkpoint_is_used(tmp_path, capsys, how):
    """And if there is none that can be read, that is said every time: nothing begins anew."""
    make_checkpoints(tmp_path)
    last = tmp_path / "last.pt"
    previous = tmp_path / "previous.pt"
    assert newest_checkpoint(tmp_path) == last
    assert load_checkpoint(last)["step"] == 2
    good = last.read_bytes()
    data = bytearray(good)
    if how == "missing":  # killed between the two renames
        last.unlink()
    elif how == "flipped":
        data[len(data) // 2] ^= 4
        last.write_bytes(data)
    else:
        last.write_bytes(data[: len(data) // 2] if how == "truncated" else b"")
    assert newest_checkpoint(tmp_path) == previous
    assert load_checkpoint(previous)["step"] == 1
    if how != "missing":
        assert "WARNING" in capsys.readouterr().err
        assert (tmp_path / "last.damaged").exists()
        assert not last.exists()
    previous.write_bytes(b"PK nonsense")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="no checkpoint in .* can be read: restore one"):
            newest_checkpoint(tmp_path)
    last.write_bytes(good)
    assert newest_checkpoint(tmp_path) == last
    (tmp_path / "new").mkdir()
    assert newest_checkpoint(tmp_path / "new") is None


def test_a_damaged_checkpoint_costs_updates_not_the_run(tmp_path, train, capsys):
    args = [*RUN, "--updates", 12, "--save_every", 4]
    assert train(*args, "--out_dir", "whole") == 0
    assert train(*args, "--out_dir", "cut") == 0
    data = bytearray((tmp_path / "cut" / "last.pt").read_bytes())
    data[len(data) // 3] ^= 1
    (tmp_path / "cut" / "last.pt").write_bytes(data)
    capsys.readouterr()
    assert train(*args, "--out_dir", "cut") == 0
    said = capsys.readouterr()
    assert "WARNING: cut/last.pt is not a checkpoint" in said.err
    assert said.out.startswith("cut, from update 8: ")
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_disk_that_fills_up(tmp_path, script, train):
    """The run goes on without checkpoints, and fails at the end if it cannot save; with room it completes."""
    args = [*RUN, "--updates", 12, "--save_every", 4, "--out_dir", "run"]
    body = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))"
    result = script(start_of(tmp_path, body), *args, check=False)
    for step in (4, 8):
        assert f"WARNING: could not save update {step} in run: " in result.stdout
    assert result.returncode == 1
    assert re.fullmatch(r"pretrain\.py: could not save update 12 in run: .+\n", result.stderr)
    assert not list((tmp_path / "run").glob("*.tmp"))
    assert not (tmp_path / "run" / "last.pt").exists()
    assert last_step(tmp_path / "run") == 12
    assert train(*args) == 0
    assert train(*args, "--out_dir", "whole") == 0
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")


class Attack:
    """Unpickling this runs a command, which makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_checkpoint_cannot_run_code(tmp_path, train):
    """Neither one that is read by itself, nor a run's own, nor one to start from."""
    trap = tmp_path / "ran"
    torch.save(dict(step=1, student=Attack(trap)), tmp_path / "trap.pt")
    with pytest.raises(CheckpointError, match="damaged, or holds Python objects, which could run code$"):
        load_checkpoint(tmp_path / "trap.pt")
    args = [*RUN, "--out_dir", "run", "--updates", 1, "--warmup", 0]
    with pytest.raises(CheckpointError):
        train(*args, "--init", "trap.pt")
    assert train(*args) == 0
    os.replace(tmp_path / "trap.pt", tmp_path / "run" / "last.pt")
    with pytest.raises(CheckpointError, match="no checkpoint in run can be read"):
        train(*args)
    assert not trap.exists()
    torch.load(tmp_path / "run" / "last.damaged", weights_only=False)
    assert trap.exists()  # so it would have run


# --- data -------------------------------------------------------------------------------------------------


def test_a_broken_data_set_stops_the_run(tmp_path, train, capsys):
    for i in range(20):
        soundfile.write(tmp_path / f"{i}.wav", tone(8000 + i).numpy(), 16_000)
    for i in range(0, 20, 5):
        (tmp_path / f"{i}.wav").write_text("overwritten")
    (tmp_path / "m.tsv").write_text(f"{tmp_path}\n" + "".join(f"{i}.wav\t8000\n" for i in range(20)))
    args = [*SHORT, "--data", "m.tsv", "--updates", 40, "--batch_size", 10]
    assert train(*args, "--out_dir", "run") == 1
    step = last_step(tmp_path / "run")
    assert step == 10  # the first after which 100 clips have been read
    said = capsys.readouterr().out
    assert re.search(rf"^update {step}: 20 of 100 clips cannot be used \(--max_bad_fraction\)$", said, re.M)
    listed = (tmp_path / "run" / "bad_files.tsv").read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in listed) == ["0.wav", "10.wav", "15.wav", "5.wav"]
    assert train(*args, "--updates", 15, "--out_dir", "again", "--max_bad_fraction", 0.5) == 0
    assert read_log(tmp_path / "again")[-1]["bad_clips"] == 15 * 10 // 5


def test_a_file_replaced_while_training_is_noticed(tmp_path):
    """Another clip stands in for one that cannot be read any more, always the same one."""
    for i in range(3):
        soundfile.write(tmp_path / f"{i}.wav", tone(8000 + i).numpy(), 16_000)
    (tmp_path / "m.tsv").write_text(f"{tmp_path}\n" + "".join(f"{i}.wav\t8000\n" for i in range(3)))
    dataset = AudioDataset(tmp_path / "m.tsv")
    assert not dataset[1].problem
    soundfile.write(tmp_path / "other.flac", tone(9000).numpy(), 16_000)
    os.replace(tmp_path / "other.flac", tmp_path / "1.wav")  # the wrong extension: libsndfile looks inside
    assert not dataset[1].problem
    assert len(dataset[1].waveform) == 9000
    (tmp_path / "1.wav").write_bytes(b"gone")
    for _ in range(2):
        waveform, item, problem = dataset[1]
        assert problem.startswith("1.wav\t")
        assert item == 2
        assert torch.equal(waveform, dataset[2].waveform)


@pytest.mark.parametrize("what", ["", "target_std", "pred_std"])
def test_collapse_warns_or_stops(tmp_path, train, capsys, what):
    """After the warm-up, if targets or predictions are the same everywhere; a sound run is left alone."""
    still = "--updates 4 --lr 1e-30 --ema_decay 1 --ema_decay_end 1".split()
    assert train(*RUN, *still, "--out_dir", "sound") == 0
    state = load_checkpoint(tmp_path / "sound" / "last.pt")
    if what == "target_std":  # what a teacher says that has collapsed
        for name, value in state["teacher"].items():
            value.mul_("mlp.fc2" not in name)
    if what == "pred_std":  # and a student
        state["student"]["decoder.proj.weight"].zero_()
    torch.save(state, tmp_path / "init.pt")
    args = [*RUN, *still, "--init", "init.pt"]
    capsys.readouterr()
    assert train(*args, "--out_dir", "warns") == 0
    said = capsys.readouterr()
    assert said.out.count("WARNING: the features have collapsed") == (2 if what else 0)
    assert not said.err
    assert train(*args, "--out_dir", "stops", "--stop_on_collapse") == bool(what)
    said = capsys.readouterr()
    assert ("update 3: the features have collapsed" in said.out) == bool(what)
    assert last_step(tmp_path / "stops") == (3 if what else 4)
    last = read_log(tmp_path / "stops")[-1]
    assert (last["target_std"] < 0.1) == (what == "target_std")
    assert (last["pred_std"] < 0.01) == (what == "pred_std")
    assert train(*args, "--out_dir", "late", "--stop_on_collapse", "--warmup", 3) == bool(what)
    assert last_step(tmp_path / "late") == 4  # the warm-up is over


def test_an_update_without_a_finite_gradient_is_skipped_and_too_many_stop_the_run(
    tmp_path, train, capsys, monkeypatch
):
    """So many in a row: every other one is no reason to stop."""
    args = [*RUN, "--updates", 100, "--max_skipped", 20]
    assert train(*args, "--lr", 1e30, "--out_dir", "run") == 1
    assert "20 updates in a row had no finite gradient" in capsys.readouterr().out
    log = read_log(tmp_path / "run")
    assert [line["skipped"] for line in log[-20:]] == [1] * 20
    assert log[-21]["skipped"] == 0
    assert all(line["loss"] is None for line in log if line["skipped"])
    real = pretrain.descend
    norms = itertools.cycle((1, math.nan))
    monkeypatch.setattr(pretrain, "descend", lambda *args: real(*args) * next(norms))
    assert train(*args, "--updates", 12, "--max_skipped", 2, "--log_every", 4, "--out_dir", "other") == 0
    log = read_log(tmp_path / "other")
    assert [(line["step"], line["skipped"]) for line in log] == [(1, 0), (3, 1), (4, 1), (8, 2), (12, 2)]
    assert log[2]["loss"] is None
    assert all(line["loss"] > 1 for line in log if line["step"] != 4)


def wav(n_bytes: int = 32_000, channels: int = 1, rate: int = 16_000, claimed: int | None = None) -> bytes:
    """A wav file whose header may claim anything."""
    body = (np.random.default_rng(0).standard_normal(n_bytes // 2) * 3000).astype("<i2").tobytes()
    if claimed is None:
        claimed = n_bytes
    block = 2 * channels
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * block % 2**32, block % 65536, 16)
    riff = struct.pack("<4sI4s4sI", b"RIFF", (36 + claimed) % 2**32, b"WAVE", b"fmt ", len(form))
    return riff + form + struct.pack("<4sI", b"data", claimed) + body


def resident(what: str) -> float:
    """Memory of this process now (VmRSS), or its peak (VmHWM), in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


ABSURD = (
    dict(n_bytes=0, claimed=2**32 - 1), dict(n_bytes=100, claimed=2**32 - 40), dict(channels=60_000),
    dict(channels=0), dict(rate=0), dict(rate=1), dict(rate=2**31 - 1), dict(rate=2**32 - 1),
    dict(channels=65_535, rate=999_983),
)  # fmt: skip


@pytest.mark.parametrize("header", ABSURD)
def test_absurd_headers_cost_little(tmp_path, header):
    """Neither time nor memory; one that claims more sound than there is may be read."""
    (tmp_path / "good.wav").write_bytes(wav())
    assert len(load_audio(tmp_path / "good.wav")) == 16_000
    (tmp_path / "x.wav").write_bytes(wav(**header))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    begin = time.process_time()
    try:
        load_audio(tmp_path / "x.wav", 0, 164_080)
        assert header == dict(n_bytes=100, claimed=2**32 - 40)
    except InputError as error:
        assert str(error)
        assert "\n" not in str(error)
    assert time.process_time() - begin < 2
    assert resident("VmHWM") - before < 500


@pytest.mark.parametrize("rounds", [100, pytest.param(2000, marks=LONG)])
def test_files_that_are_replaced_while_they_are_read(tmp_path, rounds):
    """By another file, by damage, by a link to nothing: what is read is one of the files, or is refused."""
    rng = random.Random(rounds)
    path = tmp_path / "x.wav"
    for n_samples in (8000, 12_000):
        soundfile.write(tmp_path / f"{n_samples}.wav", tone(n_samples).numpy(), 16_000)
    files = [load_audio(tmp_path / f"{n}.wav") for n in (8000, 12_000)]
    (tmp_path / "bad.wav").write_bytes(wav(n_bytes=9000)[:60])
    stop = threading.Event()
    said = []
    end = time.time() + 60

    def replace() -> None:
        while not stop.is_set():
            (tmp_path / "new").symlink_to(tmp_path / rng.choice(["8000.wav", "12000.wav", "bad.wav", "gone"]))
            os.replace(tmp_path / "new", path)

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        while (len(said) < rounds or {"ok", "a broken link"} - set(said)) and time.time() < end:
            try:
                found = load_audio(path)
                assert any(torch.equal(found, file) for file in files)
                said.append("ok")
            except InputError as error:
                said.append(str(error))
    finally:
        stop.set()
        thread.join()
    assert {"ok", "a broken link"} <= set(said)


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.binary(max_size=400), st.text(max_size=400).map(str.encode), st.lists(
    st.tuples(st.text(max_size=20), st.one_of(st.integers(), st.text(max_size=8)), st.text(max_size=8)),
    max_size=8,
).map(lambda rows: "\n".join(["root", *("\t".join(map(str, row)) for row in rows)]).encode())))  # fmt: skip
def test_any_bytes_are_a_manifest_or_refused(tmp_path_factory, content):
    """What is taken for a manifest has a name and a length on every line, and stays within its folder."""
    path = tmp_path_factory.mktemp("m", numbered=True) / "m.tsv"
    path.write_bytes(content)
    try:
        manifest = Manifest(path)
    except InputError as error:
        assert "\n" not in str(error)
        return
    root = os.path.abspath(manifest.root)
    assert len(manifest.lines) == len(manifest.n_samples) > 0
    for i, n_samples in enumerate(manifest.n_samples.tolist()):
        name, length, *labels = manifest.fields(i)
        assert int(length) == n_samples >= 0
        assert all(isinstance(label, str) for label in labels)
        try:
            assert os.path.commonpath([root, os.path.abspath(manifest.path(i))]) == root
        except InputError as error:
            assert "outside" in str(error)
            assert os.path.isabs(name) or ".." in name
