"""Fixtures shared by the tests: small audio files made from a formula, and a quick way to run a script."""

import atexit
import contextlib
import dataclasses
import functools
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import finetune
import pretrain
from data import InputError, first_line
from evaluate import STOP, parse_config, save_checkpoint
from model import MODELS, AudioClassifier, CheckpointError

if "TEST_GPU" not in os.environ:  # bits and tolerances are a CPU's; TEST_GPU=1 pytest -k "gpu or cuda"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # of all scripts: the tensors are small
torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]


def tone(n_samples: int, rate: int = 16_000, hz: float = 440.0) -> torch.Tensor:
    """A decaying tone over a little noise, (n_samples,)."""
    t = torch.arange(n_samples) / rate
    noise = torch.randn(n_samples, generator=torch.Generator().manual_seed(n_samples))
    return 0.4 * torch.exp(-3 * t) * torch.sin(2 * torch.pi * hz * t) + 0.01 * noise


@pytest.fixture
def folder(tmp_path) -> Path:
    """Eight good clips of 0.5 to 1.2 s with manifest.tsv beside them."""
    lines = [str(tmp_path)]
    for i in range(8):
        n = 8000 + 1600 * i
        soundfile.write(tmp_path / f"clip {i}.wav", tone(n, hz=200 * (i + 1)).numpy(), 16_000)
        lines.append(f"clip {i}.wav\t{n}\t{'low' if i < 4 else 'high'}")
    (tmp_path / "manifest.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path


def bad_files(folder: Path) -> dict[str, str]:
    """Broken audio of many kinds, and a word of what is said about each."""
    wav = (folder / "clip 0.wav").read_bytes()
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.wav").write_text("not audio at all")
    (folder / "truncated.flac").write_bytes(b"fLaC" + b"\0" * 20)
    (folder / "header only.wav").write_bytes(wav[:44])
    soundfile.write(folder / "silent.wav", np.zeros(16_000), 16_000)
    soundfile.write(folder / "short.wav", np.ones(100) / 2, 16_000)
    soundfile.write(folder / "nan.wav", np.full(16_000, np.nan), 16_000, subtype="FLOAT")
    (folder / "folder.wav").mkdir()
    return {
        "missing.wav": "no such file", "empty.wav": "empty", "text.wav": "a text file",
        "truncated.flac": "unreadable", "header only.wav": "too short", "silent.wav": "silent",
        "short.wav": "too short", "nan.wav": "its samples reach nan", "folder.wav": "no such file",
    }  # fmt: skip


class Script:
    """A script of the project in a process of its own, which starter.py starts at once; under torchrun, with
    the flags `torchrun`, if there are to be several. Output goes to the files `out` and `err`."""

    def __init__(
        self, command: list, folder: Path, out: Path, err: Path, processes: int = 1,
        torchrun: tuple[str, ...] = ("--standalone",), **environment,
    ):  # fmt: skip
        argv = list(map(str, command))
        env = os.environ | environment
        if processes > 1:
            argv = ["torchrun", *torchrun, f"--nproc_per_node={processes}", *argv]
            env["TMPDIR"] = str(out.parent)  # torchrun leaves a folder there
        self.pid = ask_starter(argv=argv, cwd=str(folder), env=env, out=str(out), err=str(err))
        self.status = None

    def poll(self) -> int | None:
        """Its exit status, or minus the signal that ended it; None while it runs."""
        if self.status is None:
            self.status = ask_starter(pid=self.pid)
        return self.status

    def wait(self, seconds: float = 300) -> int:
        """Wait for its end. Raises TimeoutError."""
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"a script still runs after {seconds} s")
            time.sleep(0.01)
        return self.status

    def kill(self) -> None:
        """SIGKILL to it and its children, which would survive torchrun. Returns when they are gone."""
        pids = [self.pid, *children(self.pid)]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while self.poll() is None or any(map(is_running, pids)):
            time.sleep(0.01)


def ask_starter(**request):
    """Let the process of starter.py do something; returns its answer."""
    process = start_starter()
    print(json.dumps(request), file=process.stdin, flush=True)
    return json.loads(process.stdout.readline())


@functools.cache
def start_starter() -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "tests" / "starter.py")]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, env=os.environ, start_new_session=True, **pipes)
    atexit.register(process.communicate)  # closes its input, so that it ends
    return process


def children(pid: int) -> list[int]:
    """Process numbers of the children of a process, in the order in which they were started."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:  # it has just ended
        return []


def is_running(pid: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


@pytest.fixture
def script(tmp_path):
    """Runs a script of the project in tmp_path: script("evaluate.py", "run", ...) -> CompletedProcess."""

    def run(
        name: str, *args, processes: int = 1, check: bool = True, **environment
    ) -> subprocess.CompletedProcess:
        command = [ROOT / name, *args]
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "out")
            err = Path(folder, "err")
            status = Script(command, tmp_path, out, err, processes, **environment).wait(600)
            texts = [path.read_bytes().decode() for path in (out, err)]
            result = subprocess.CompletedProcess(command, status, *texts)
        assert not check or result.returncode == 0, result.stdout + result.stderr
        return result

    return run


@pytest.fixture
def called(tmp_path, monkeypatch, capfd):
    """Calls the main function of a script in tmp_path, in this process: called(evaluate, "run", ...)."""

    def call(module, *args, check: bool = True) -> subprocess.CompletedProcess:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, args)])
        capfd.readouterr()
        try:
            status = module.main()
        except (InputError, CheckpointError, OSError) as error:  # as evaluate.run_script
            print(f"{Path(module.__file__).name}: {first_line(error)}", file=sys.stderr)
            status = 1
        except SystemExit as end:  # --help
            status = end.code or 0
        result = subprocess.CompletedProcess(sys.argv, status, *capfd.readouterr())
        assert not check or result.returncode == 0, result.stdout + result.stderr
        return result

    return call


def in_process(module, config, folder, monkeypatch):
    """A function that does in `folder`, in this process, what a script does with the flags that it is given.

    It returns the exit status, or raises the InputError whose words the script would print. One thread, as
    in the processes that `script` starts.
    """
    monkeypatch.chdir(folder)
    names = ("SIGTERM", "SIGINT", "SIGUSR1")
    handlers = {name: signal.getsignal(getattr(signal, name)) for name in names}

    def run(*args) -> int:
        try:
            return module.train(parse_config(config, module.PRESETS, [*map(str, args)]))
        finally:
            gc.collect()  # lets go of the run's lock
            torch.set_num_threads(1)
            STOP.number = 0  # a test may have sent a signal
            for name, handler in handlers.items():
                signal.signal(getattr(signal, name), handler)

    return run


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Pre-trains in tmp_path: train("--data", ...) -> exit status. Quicker than `script`."""
    return in_process(pretrain, pretrain.PretrainConfig, tmp_path, monkeypatch)


@pytest.fixture
def tune(tmp_path, monkeypatch):
    """Fine-tunes in tmp_path: tune("--data", ...) -> exit status. Quicker than `script`."""
    return in_process(finetune, finetune.FinetuneConfig, tmp_path, monkeypatch)


@pytest.fixture
def classifier(folder) -> Path:
    """classifier.pt in the folder of clips: untrained, of two exclusive classes, with clips of 0.96 s."""
    torch.manual_seed(0)
    config = dataclasses.replace(MODELS["tiny"], clip_frames=96)
    model = AudioClassifier(config, {"low": "Low tone", "high": "High tone"}, exclusive=True)
    torch.nn.init.normal_(model.head.weight, std=0.1)
    state = dict(network=dataclasses.asdict(config), head=model.head_settings, classifier=model.state_dict())
    save_checkpoint(folder / "classifier.pt", step=1, **state)
    return folder
