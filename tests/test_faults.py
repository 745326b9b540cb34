"""A run that cannot lose work: processes killed, stopped and frozen, disks full, files damaged, bad input.

`python -m pytest` runs a short form of each; `python -m pytest -m long tests/test_faults.py` the long one.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import itertools
import json
import math
import multiprocessing
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
from conftest import ROOT, tone
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pretrain import SHORT, losses, our_lines, read_log

import pretrain
from data import AudioDataset, InputError, Manifest, build_loader, load_audio
from listen import count_samples
from model import CheckpointError, load_checkpoint, newest_checkpoint, save_checkpoint

LONG = pytest.mark.long
RUN = [*SHORT, "--data", ROOT / "extras" / "demo" / "pretrain.tsv", "--clip_frames", 48]


def digest(out_dir: Path, name: str = "last.pt") -> str:
    """Hash of everything a checkpoint says about student, teacher, optimizer and scaler."""
    state, total = load_checkpoint(out_dir / name), hashlib.sha256()

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


class Job:
    """pretrain.py, under torchrun if there are several processes, started with its output in a file.

    With a port, one of two nodes of so many processes each.
    """

    def __init__(self, folder: Path, *args, processes=2, restarts=0, program="pretrain.py", port=0):
        node = ["--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}"]
        torchrun = ["-m", "torch.distributed.run", *(node if port else ["--standalone"])]
        torchrun += [f"--nproc_per_node={processes}", f"--max_restarts={restarts}"]
        command = [sys.executable, *(torchrun if processes > 1 else []), ROOT / program, *args]
        self.output, self.processes = open(folder / "output.txt", "a+"), processes
        options = dict(cwd=folder, stdout=self.output, stderr=subprocess.STDOUT)
        self.process = subprocess.Popen(list(map(str, command)), start_new_session=True, **options)

    def ranks(self) -> list[int]:
        """Process numbers of the training processes, by rank."""
        if self.processes == 1:
            return [self.process.pid]
        return [pid for pid in children(self.process.pid) if b"pretrain.py" in command_line(pid)]

    def wait_for(self, condition, seconds: float = 180) -> bool:
        """True as soon as the condition holds, False if the job ends first."""
        end = time.time() + seconds
        while not condition():
            if self.process.poll() is not None:
                return False
            assert time.time() < end, self.text()
            time.sleep(0.01)
        return True

    def text(self) -> str:
        self.output.seek(0)
        return self.output.read()

    def wait(self, seconds: float = 120) -> int:
        try:
            return self.process.wait(seconds)
        finally:
            if self.process.poll() is None:
                self.kill()

    def kill(self) -> None:
        """SIGKILL to all processes; torchrun's children would survive it. Returns when they are gone."""
        pids = [self.process.pid, *children(self.process.pid)]
        pids += [loader for pid in pids[1:] for loader in children(pid)]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        while any(map(command_line, pids)):
            time.sleep(0.01)


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:  # it has just ended
        return []


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has just ended
        return b""


def last_step(out_dir: Path) -> int:
    log = read_log(out_dir) if (out_dir / "log.jsonl").exists() else []
    return max((line["step"] for line in log), default=0)


def saved_step(out_dir: Path) -> int:
    return load_checkpoint(newest_checkpoint(out_dir))["step"]


# --- processes --------------------------------------------------------------------------------------------

GAP = 25  # updates between kills


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
    another number of loader processes, in mid-epoch, between two checkpoints."""
    updates, rng, cut = GAP * (kills + 1), random.Random(kills), tmp_path / "cut"
    args, whole = [*RUN, "--updates", updates, "--out_dir", "cut"], uncut(updates)
    for kill in range(kills):
        step = GAP * kill + rng.randint(GAP // 2, GAP)
        other = ["--workers", rng.choice([0, 1, 4]), "--save_every", rng.choice([5, 7])]
        job = Job(tmp_path, *args, *other)
        if kill % 4 == 3:
            time.sleep(rng.uniform(1, 5))
        else:
            assert job.wait_for(lambda step=step: last_step(cut) >= step)
        ranks = job.ranks()
        if kill % 3 == 1 or not ranks:
            job.kill()
        else:
            os.kill(rng.choice(ranks), signal.SIGKILL)
        assert job.wait() != 0
    step = saved_step(cut)
    assert 0 < step < updates
    last = Job(tmp_path, *args)
    assert last.wait(600) == 0 and f"resuming at update {step} " in last.text()
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
    """Also a signal to all ranks and their loader processes, as a batch system sends it. What was logged is
    saved, and the exit status of every process is 128 + the signal's number."""
    args = [*RUN, "--updates", 400, "--out_dir", "run", "--save_every", 10_000, "--workers", 1]
    job = Job(tmp_path, *args)
    assert job.wait_for(lambda: last_step(tmp_path / "run") >= 5)
    seen, ranks = last_step(tmp_path / "run"), job.ranks()
    loaders = [pid for r in ranks for pid in children(r)]
    assert len(ranks) == 2 == len(loaders)
    for pid in [*loaders, *ranks] if rank == "all" else [ranks[rank]]:
        os.kill(pid, number)
    assert job.wait() != 0
    step, words = saved_step(tmp_path / "run"), job.text().split()
    why = "another process stops" if rank == 1 else f"stopped by {number.name}; the same command goes on"
    assert f"update {step}: {why}" in job.text()
    exits = [int(words[i + 2]) for i, word in enumerate(words) if word == "exitcode" and words[i + 1] == ":"]
    assert len(exits) == 2 and set(exits) <= {128 + number, -signal.SIGTERM}  # torchrun may end the slower
    assert 128 + number in exits
    assert seen <= step == last_step(tmp_path / "run") < 400


def test_a_signal_while_the_processes_agree_is_not_lost(tmp_path):
    """It comes too late for this agreement, so that all stop after the next update."""
    (tmp_path / "start.py").write_text(f"""
import os, runpy, signal, sys
import torch.distributed as dist
real, seen = dist.all_reduce, []
def all_reduce(x, op=dist.ReduceOp.SUM, **options):
    seen.extend([op] if op == dist.ReduceOp.MAX else [])
    if len(seen) == 5 and op == dist.ReduceOp.MAX and os.environ["RANK"] == "0":
        signal.raise_signal(signal.SIGTERM)
    return real(x, op, **options)
dist.all_reduce = all_reduce
sys.argv[0] = "pretrain.py"
sys.path.insert(0, {str(ROOT)!r})
runpy.run_path({str(ROOT / "pretrain.py")!r}, run_name="__main__")
""")
    job = Job(tmp_path, *RUN, "--updates", 40, "--out_dir", "run", program=tmp_path / "start.py")
    assert job.wait() != 0 and "update 6: stopped by SIGTERM" in job.text()
    assert saved_step(tmp_path / "run") == 6 == last_step(tmp_path / "run")


def test_a_stopped_run_goes_on_bit_for_bit_with_accumulation_and_packed_data(tmp_path, script):
    demo = ROOT / "extras" / "demo" / "pretrain.tsv"
    script("extras/prepare.py", "pack", demo, "packed.tsv", "--workers", 0)
    args = [*RUN, "--data", "packed.tsv", "--accumulate", 2, "--updates", 60]
    script("pretrain.py", *args, "--out_dir", "whole")
    job = Job(tmp_path, *args, "--out_dir", "cut", processes=1)
    assert job.wait_for(lambda: last_step(tmp_path / "cut") >= 10)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 128 + signal.SIGTERM
    step = saved_step(tmp_path / "cut")
    said = script("pretrain.py", *args, "--out_dir", "cut", "--workers", 4).stdout
    assert f"resuming at update {step} " in said
    assert 10 <= step < 60 and digest(tmp_path / "cut") == digest(tmp_path / "whole")


def test_going_on_with_another_number_of_processes(tmp_path, train):
    """Two processes that accumulate, then one that does not: the curve of one from the beginning, to 1e-5."""
    args = [*RUN, "--updates", 20, "--save_every", 5]
    assert train(*args, "--out_dir", "whole") == 0
    job = Job(tmp_path, *args, "--out_dir", "cut", "--accumulate", 2)
    assert job.wait_for(lambda: last_step(tmp_path / "cut") >= 6)
    job.kill()
    assert 5 <= saved_step(tmp_path / "cut") < 20 and train(*args, "--out_dir", "cut") == 0
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


@pytest.mark.parametrize("patience", [0, pytest.param(120, marks=LONG)])
def test_a_frozen_rank_ends_the_job(tmp_path, patience):
    """The others give up after --timeout. Then torchrun takes 30 s to kill the one that does not answer; the
    short form does that itself."""
    job = Job(tmp_path, *RUN, "--updates", 1000, "--out_dir", "run", "--timeout", 0.1, "--save_every", 5)
    assert job.wait_for(lambda: last_step(tmp_path / "run") >= 6)
    first, frozen = job.ranks()
    os.kill(frozen, signal.SIGSTOP)
    assert job.wait_for(lambda: b"pretrain.py" not in command_line(first), seconds=30)
    if not patience:
        os.kill(frozen, signal.SIGKILL)
    assert job.wait(patience or 20) != 0
    assert saved_step(tmp_path / "run") >= 5


def two_nodes(folder: Path, *args) -> list[Job]:
    """A job of two nodes with two processes each, both of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [Job(folder, *args, port=port) for _ in range(2)]


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
    assert 0 < step < 2 * GAP and step % 7 == 0
    again = two_nodes(tmp_path, *args, "--out_dir", "cut")
    assert [node.wait(300) for node in again] == [0, 0]
    assert f"resuming at update {step} in cut: 4 x " in again[0].text()
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


@LONG
def test_torchrun_restarts_the_job_by_itself(tmp_path, uncut):
    updates = 3 * GAP
    job = Job(tmp_path, *RUN, "--updates", updates, "--save_every", 5, "--out_dir", "cut", restarts=2)
    for rank, step in enumerate((20, 50)):
        assert job.wait_for(lambda step=step: last_step(tmp_path / "cut") >= step)
        os.kill(job.ranks()[rank], signal.SIGKILL)
    assert job.wait() == 0
    assert digest(tmp_path / "cut") == digest(uncut(updates))


def test_two_runs_in_one_folder_are_refused(tmp_path, train):
    """By a lock that ends with its process, however that ends."""
    args = [*RUN, "--updates", 1000, "--save_every", 1, "--out_dir", "run"]
    job = Job(tmp_path, *args, processes=1)
    assert job.wait_for(lambda: last_step(tmp_path / "run") >= 1)
    with pytest.raises(InputError, match="another process is running in run: wait for it"):
        train(*args)
    step = last_step(tmp_path / "run")
    assert job.wait_for(lambda: last_step(tmp_path / "run") > step)  # it does not notice
    job.kill()
    with pytest.raises(InputError, match="run has other settings"):
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
        assert train(*args) == 0 and last_step(tmp_path / "run") == 1
        warning = "WARNING: no locks in run: see that one process runs in it\n"
        assert capsys.readouterr().out.count(warning) == 1


# --- loaders ----------------------------------------------------------------------------------------------

LOADING = {
    "pretrain.py": [*SHORT, "--data", "manifest.tsv", "--out_dir", "run"],
    "finetune.py": [
        *"--preset own --model tiny --init scratch --clip_frames 64 --batch_size 8 --updates 3".split(),
        *"--data manifest.tsv --eval_data manifest.tsv --min_samples 1600 --out_dir tuned".split(),
    ],
    "evaluate.py": ["classifier.pt", "manifest.tsv"],
    "prepare.py pack": ["long.tsv", "packed.tsv"],
    "prepare.py stats": ["long.tsv"],
}
CURE = "try more shared memory (docker --ipc=host or --shm-size), or --workers 0"


def command_of(name: str, folder: Path, *more) -> list[str]:
    """The command line of one of LOADING; files of its own are made in the folder."""
    soundfile.write(folder / "long.wav", tone(320_000).numpy(), 16_000)
    (folder / "long.tsv").write_text(f"{folder}\nlong.wav\t320000\n")
    program, *command = name.replace("prepare.py", "extras/prepare.py").split()
    return [str(x) for x in (ROOT / program, *command, *LOADING[name], "--workers", 1, *more)]


def test_a_full_shared_memory_ends_each_script_at_once(classifier):
    """As in a container, whose /dev/shm has 64 MB: one line that names the cure, long before --timeout."""
    mount = "mount -t tmpfs -o size=300k tmpfs /dev/shm"
    with_little = ["unshare", "-rm", "sh", "-c", f"{mount} && exec \"$@\"", "-"]
    if not shutil.which("unshare") or subprocess.run([*with_little, "true"], capture_output=True).returncode:
        pytest.skip("needs unshare, and to be permitted to use it")
    commands = [command_of(name, classifier, "--timeout", 0.3) for name in LOADING]
    requests = [dict(argv=command, out=f"out {i}", err=f"err {i}") for i, command in enumerate(commands)]
    lines = [json.dumps(dict(cwd=str(classifier), env=dict(os.environ)) | request) for request in requests]
    run = dict(input="\n".join(lines), stdout=subprocess.PIPE, text=True, start_new_session=True)
    start = [*with_little, sys.executable, str(ROOT / "tests" / "starter.py")]
    done = subprocess.run(start, cwd=classifier, timeout=120, **run)
    assert done.stdout.split() == ["1"] * len(LOADING)
    for i, request in enumerate(requests):
        said, program = (classifier / f"err {i}").read_text(), Path(request["argv"][0]).name
        assert re.fullmatch(rf"{program}: DataLoader worker .* exited .*: {re.escape(CURE)}\n", said), said


# Runs a script whose loader processes stop at the first clip they read: those of rank 1, if there are several
STOPPING = f"""
import os, runpy, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "extras")!r}]
import data
from torch.utils.data import get_worker_info
real = data.read_pieces
def read_pieces(*args, **options):
    if get_worker_info() and os.environ.get("RANK", "1") == "1":
        open("stopped", "w").write(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
    return real(*args, **options)
data.read_pieces = read_pieces
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("name", LOADING)
def test_a_loader_that_stands_still_ends_the_script(classifier, script, name):
    """Within --timeout, by one line that names the cure; the loader does not outlive it."""
    (classifier / "stopping.py").write_text(STOPPING)
    command, stopped = command_of(name, classifier, "--timeout", 0.03), classifier / "stopped"
    result = script(classifier / "stopping.py", *command, check=False)
    assert time.time() - stopped.stat().st_mtime < 1.8 + 6
    said = rf"{Path(command[0]).name}: DataLoader timed out after 1\.\d+ seconds: {re.escape(CURE)}\n"
    assert result.returncode == 1 and re.fullmatch(said, result.stderr), result.stderr
    assert not command_line(int(stopped.read_text()))


@LONG
def test_a_loader_that_stands_still_ends_all_processes(classifier, script):
    """Its process says so before the others, which wait for it, give up."""
    (classifier / "stopping.py").write_text(STOPPING)
    command = command_of("pretrain.py", classifier, "--timeout", 0.1)
    result = script(classifier / "stopping.py", *command, processes=2, check=False)
    said = f"pretrain.py: DataLoader timed out after 5.4 seconds: {CURE}"
    assert result.returncode == 1 and our_lines(result) == [said]
    assert not command_line(int((classifier / "stopped").read_text()))


def test_a_loader_stopped_with_batches_on_offer_is_ended(folder):
    """To fetch one that it has offered takes its help: torch would wait for that without end."""
    batches = build_loader(AudioDataset(folder / "manifest.tsv"), [[i] for i in range(8)], 1, timeout=1)
    next(batches)
    (loader,) = multiprocessing.active_children()
    time.sleep(0.5)  # for the next ones to be on offer
    os.kill(loader.pid, signal.SIGSTOP)
    start, rescue = time.monotonic(), threading.Timer(20, loader.kill)
    rescue.start()
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        list(batches)
    rescue.cancel()
    assert time.monotonic() - start < 15 and not command_line(loader.pid)


def test_a_signal_to_loaders_that_have_just_started_does_not_end_them(folder):
    """A signal to the whole group may come at any time, in an evaluation that starts its loaders too."""
    for _ in range(5):
        batches = build_loader(AudioDataset(folder / "manifest.tsv"), [[i] for i in range(4)], 2)
        for loader in multiprocessing.active_children():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                os.kill(loader.pid, number)
        assert [batch.items for batch in batches] == [[0], [1], [2], [3]]
    with pytest.raises(ValueError):
        build_loader(AudioDataset(folder / "manifest.tsv"), [[0]], 0, prefetch_factor=2)
    heard, before = [], signal.signal(signal.SIGUSR1, lambda *_: heard.append(True))
    signal.raise_signal(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)
    assert heard  # by the run itself, whatever became of its loaders


# --- checkpoints ------------------------------------------------------------------------------------------


def make_checkpoints(folder: Path) -> None:
    """last.pt of step 2 and previous.pt of step 1."""
    for step in (1, 2):
        save_checkpoint(folder / "last.pt", step=step, student={"w": torch.randn(300, 300)})


@pytest.mark.parametrize("n", [150, pytest.param(2000, marks=LONG)])
def test_flipped_and_truncated_checkpoints_are_never_taken_for_good(tmp_path, n):
    make_checkpoints(tmp_path)
    good, rng, refused = (tmp_path / "last.pt").read_bytes(), random.Random(0), 0
    expected = load_checkpoint(tmp_path / "last.pt")
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
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    assert newest_checkpoint(tmp_path) == last and load_checkpoint(last)["step"] == 2
    good = last.read_bytes()
    data = bytearray(good)
    if how == "missing":  # killed between the two renames
        last.unlink()
    elif how == "flipped":
        data[len(data) // 2] ^= 4
        last.write_bytes(data)
    else:
        last.write_bytes(data[: len(data) // 2] if how == "truncated" else b"")
    assert newest_checkpoint(tmp_path) == previous and load_checkpoint(previous)["step"] == 1
    if how != "missing":
        assert "WARNING" in capsys.readouterr().err
        assert (tmp_path / "last.damaged").exists() and not last.exists()
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
    assert train(*args, "--out_dir", "whole") == 0 == train(*args, "--out_dir", "cut")
    data = bytearray((tmp_path / "cut" / "last.pt").read_bytes())
    data[len(data) // 3] ^= 1
    (tmp_path / "cut" / "last.pt").write_bytes(data)
    capsys.readouterr()
    assert train(*args, "--out_dir", "cut") == 0
    said = capsys.readouterr()
    assert "WARNING: cut/last.pt is not a checkpoint" in said.err and "resuming at update 8 " in said.out
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_disk_that_fills_up(tmp_path, script):
    """The run goes on without checkpoints, and fails at the end if it cannot save; with room it completes."""
    args = [*map(str, RUN), "--updates", "12", "--save_every", "4", "--out_dir", "run"]
    (tmp_path / "full.py").write_text(
        "import resource, runpy, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
        f"sys.path.insert(0, {str(ROOT)!r})\nsys.argv[0] = 'pretrain.py'\n"
        f"runpy.run_path({str(ROOT / 'pretrain.py')!r}, run_name='__main__')\n"
    )
    result = script(tmp_path / "full.py", *args, check=False)
    for step in (4, 8):
        assert f"WARNING: could not save update {step} in run" in result.stdout
    assert result.returncode == 1 and result.stdout.count("the run goes on") == 2
    assert result.stderr.startswith("pretrain.py: could not save update 12 in run")
    assert result.stderr.count("\n") == 1 and result.stderr.endswith("the last checkpoint stands\n")
    assert not list((tmp_path / "run").glob("*.tmp")) and not (tmp_path / "run" / "last.pt").exists()
    assert last_step(tmp_path / "run") == 12
    script("pretrain.py", *args)
    script("pretrain.py", *args[:-1], "whole")
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
    with pytest.raises(CheckpointError, match="holds posix.system, which may be malicious"):
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
    args = [*SHORT, "--data", "m.tsv", "--updates", 40]
    assert train(*args, "--out_dir", "run") == 1
    step = last_step(tmp_path / "run")
    assert step == 13  # the first after which 100 clips have been read
    said = capsys.readouterr().err
    reason = "of the clips cannot be used (--max_bad_fraction): see run/bad_files.tsv"
    assert re.fullmatch(rf"update {step}: \d\d% {re.escape(reason)}\n", said)
    listed = (tmp_path / "run" / "bad_files.tsv").read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in listed) == ["0.wav", "10.wav", "15.wav", "5.wav"]
    assert train(*args, "--updates", 15, "--out_dir", "again", "--max_bad_fraction", 0.5) == 0
    assert read_log(tmp_path / "again")[-1]["bad_clips"] == 15 * 8 // 5


def test_a_file_replaced_while_training_is_noticed(tmp_path):
    """Another clip stands in for one that cannot be read any more, always the same one."""
    for i in range(3):
        soundfile.write(tmp_path / f"{i}.wav", tone(8000 + i).numpy(), 16_000)
    (tmp_path / "m.tsv").write_text(f"{tmp_path}\n" + "".join(f"{i}.wav\t8000\n" for i in range(3)))
    dataset = AudioDataset(tmp_path / "m.tsv")
    assert not dataset[1].problem
    soundfile.write(tmp_path / "other.flac", tone(9000).numpy(), 16_000)
    os.replace(tmp_path / "other.flac", tmp_path / "1.wav")  # the wrong extension: libsndfile looks inside
    assert not dataset[1].problem and len(dataset[1].waveform) == 9000
    (tmp_path / "1.wav").write_bytes(b"gone")
    for _ in range(2):
        waveform, item, problem = dataset[1]
        assert problem.startswith("1.wav\tunreadable") and item == 2
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
    assert said.out.count("WARNING: the features have collapsed") == (2 if what else 0) and not said.err
    assert train(*args, "--out_dir", "stops", "--stop_on_collapse") == bool(what)
    said = capsys.readouterr()
    assert ("update 3: the features have collapsed" in said.err) == bool(what)
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
    assert "20 updates in a row had no finite gradient" in capsys.readouterr().err
    log = read_log(tmp_path / "run")
    assert [line["skipped"] for line in log[-20:]] == [1] * 20 and log[-21]["skipped"] == 0
    assert all(line["loss"] is None for line in log if line["skipped"])
    real, norms = pretrain.descend, itertools.cycle((1, math.nan))
    monkeypatch.setattr(pretrain, "descend", lambda *args: real(*args) * next(norms))
    assert train(*args, "--updates", 12, "--max_skipped", 2, "--log_every", 4, "--out_dir", "other") == 0
    log = read_log(tmp_path / "other")
    assert [line["skipped"] for line in log] == [0, 2, 2, 2] and all(line["loss"] > 1 for line in log)


def wav(n_bytes: int = 32_000, channels: int = 1, rate: int = 16_000, claimed: int | None = None) -> bytes:
    """A wav file whose header may claim anything."""
    body = (np.random.default_rng(0).standard_normal(n_bytes // 2) * 3000).astype("<i2").tobytes()
    claimed = n_bytes if claimed is None else claimed
    block = 2 * channels
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * block % 2**32, block % 65536, 16)
    riff = struct.pack("<4sI4s4sI", b"RIFF", (36 + claimed) % 2**32, b"WAVE", b"fmt ", len(form))
    return riff + form + struct.pack("<4sI", b"data", claimed) + body


def resident(what: str = "VmRSS") -> float:
    """Memory of this process now, or its peak (VmHWM), in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def read_within(
    path: Path, seconds: float = 2.0, mebibytes: int = 500, start: int = 0, count: bool = False
) -> str:
    """Read a file from `start` on, or count what it holds and read its end; returns "ok" or the error, which
    is one line, and fails if it took too long or too much memory."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, begun = resident(), time.time()
    try:
        load_audio(path, max(0, count_samples(path) - 2000) if count else start, 164_080, allow_silence=count)
        said = "ok"
    except InputError as error:
        said = str(error)
        assert said and "\n" not in said and not (count and said.startswith("has no sound"))
    assert time.time() - begun < seconds, path
    assert resident("VmHWM") - before < mebibytes, path
    return said


ABSURD = (
    dict(n_bytes=0, claimed=2**32 - 1), dict(n_bytes=100, claimed=2**32 - 40), dict(channels=60_000),
    dict(channels=0), dict(rate=0), dict(rate=1), dict(rate=2**31 - 1), dict(rate=2**32 - 1),
    dict(channels=65_535, rate=999_983),
)  # fmt: skip


@pytest.mark.parametrize("header", ABSURD)
def test_absurd_headers_cost_little(tmp_path, header):
    (tmp_path / "x.wav").write_bytes(wav(**header))
    said = read_within(tmp_path / "x.wav")
    assert said != "ok" or header == dict(n_bytes=100, claimed=2**32 - 40)
    (tmp_path / "x.wav").write_bytes(wav())
    assert read_within(tmp_path / "x.wav") == "ok"


def mutate(data: bytearray, suffix: str, rng: random.Random) -> None:
    """Flip, overwrite, cut out or repeat some bytes, or change what an mp3 says of its length."""
    for _ in range(rng.choice([1, 3, 30])):
        at, size = rng.randrange(len(data)), rng.randrange(1, 64)
        match rng.randrange(5):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at : at + size] = rng.randbytes(size)
            case 2:
                del data[at : at + size]
            case 3:
                data[at:at] = data[at : at + size]
            case 4:  # most of what matters is at the front
                data[rng.randrange(min(len(data), 64))] = rng.choice([0, 127, 128, 255])
    place = data.find(b"Xing") if suffix == "mp3" else -1
    if place >= 0 and rng.random() < 0.7:
        frames = rng.choice([0, 1, rng.randrange(1000), rng.randrange(2**32), 2**32 - 1]).to_bytes(4, "big")
        n_bytes = rng.choice([0, len(data), 2**32 - 1]).to_bytes(4, "big")
        match rng.randrange(4):
            case 0:
                data[place + 8 : place + 12] = frames
            case 1:  # the name that files of constant bit rate have; with other fields
                data[place : place + 16] = b"Info" + bytes([0, 0, 0, rng.randrange(16)]) + frames + n_bytes
            case 2:  # Fraunhofer's, 32 bytes behind the frame's header
                data[place : place + 8] = bytes(8)
                data[36:62] = b"VBRI" + bytes([0, 1, 0, 0, 0, 75]) + n_bytes + frames + rng.randbytes(8)
            case 3:  # none, as from a pipe
                del data[: data.find(data[:2], place)]


def relink(path: Path, rng: random.Random) -> None:
    """Put a link in the file's place: to nothing, itself, a folder, or to another file; or nothing."""
    targets = (path.with_name("gone"), path, path.parent, Path("/dev/null"), path.with_name("good.wav"), None)
    path.unlink()
    if target := rng.choice(targets):
        path.symlink_to(target)


@pytest.mark.parametrize("per_format", [30, pytest.param(500, marks=LONG)])
def test_mutated_audio_never_crashes_hangs_or_swells(tmp_path, per_format):
    """Bytes of real files, in four formats, and what their names lead to, read by one process from anywhere:
    each is read or refused in one line, and of what is counted the end can be read."""
    rng, source = random.Random(per_format), AudioDataset(ROOT / "extras" / "demo" / "pretrain.tsv")
    soundfile.write(tmp_path / "good.wav", source.read(0).numpy(), 16_000)
    n_read = 0
    for suffix in ("wav", "flac", "ogg", "mp3"):
        originals, path = [], tmp_path / f"x.{suffix}"
        for item in range(0, 40, 8):
            buffer = io.BytesIO()
            soundfile.write(buffer, source.read(item).numpy(), 16_000, format=suffix.upper())
            originals.append(buffer.getvalue())
        for _ in range(per_format):
            mutate(data := bytearray(rng.choice(originals)), suffix, rng)
            path.unlink(missing_ok=True)
            path.write_bytes(data)
            if rng.random() < 0.1:
                relink(path, rng)
            n_read += read_within(path) == "ok"
            read_within(path, start=rng.randrange(2 ** rng.randrange(1, 40)))
            read_within(path, count=True)
    print(f"\n{4 * per_format} mutated files: {n_read} still read, the others refused")
    assert 0 < n_read < 4 * per_format


@pytest.mark.parametrize("rounds", [100, pytest.param(2000, marks=LONG)])
def test_files_that_are_replaced_while_they_are_read(tmp_path, rounds):
    """By another file, by damage, by a link to nothing: what is read is one of the files, or is refused."""
    rng, path = random.Random(rounds), tmp_path / "x.wav"
    for n_samples in (8000, 12_000):
        soundfile.write(tmp_path / f"{n_samples}.wav", tone(n_samples).numpy(), 16_000)
    files = [load_audio(tmp_path / f"{n}.wav") for n in (8000, 12_000)]
    (tmp_path / "bad.wav").write_bytes(wav(n_bytes=9000)[:60])
    stop, said, end = threading.Event(), [], time.time() + 60

    def replace() -> None:
        while not stop.is_set():
            (tmp_path / "new").symlink_to(tmp_path / rng.choice(["8000.wav", "12000.wav", "bad.wav", "gone"]))
            os.replace(tmp_path / "new", path)

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        while (len(said) < rounds or {"ok", "a link to nothing"} - set(said)) and time.time() < end:
            try:
                found = load_audio(path)
                assert any(torch.equal(found, file) for file in files)
                said.append("ok")
            except InputError as error:
                said.append(str(error))
            with contextlib.suppress(InputError):
                assert count_samples(path) in (8000, 12_000)
    finally:
        stop.set()
        thread.join()
    assert {"ok", "a link to nothing"} <= set(said)


@settings(max_examples=300, deadline=None)
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
    assert len(manifest.begins) == len(manifest.n_samples) > 0
    for i, n_samples in enumerate(manifest.n_samples.tolist()):
        name, length, *labels = manifest.fields(i)
        assert int(length) == n_samples >= 0 and all(isinstance(label, str) for label in labels)
        try:
            assert os.path.commonpath([root, os.path.abspath(manifest.path(i))]) == root
        except InputError as error:
            assert "outside" in str(error) and (os.path.isabs(name) or ".." in name)
