"""Fixtures shared by the tests: small audio files made from a formula, and a quick way to run a script."""

import dataclasses
import gc
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import soundfile
import torch

import finetune
import pretrain
from data import InputError, first_line
from evaluate import parse_config, save_checkpoint
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


@pytest.fixture(scope="session")
def starter():
    """The process that starts scripts: see starter.py."""
    command = [sys.executable, str(ROOT / "tests" / "starter.py")]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(command, env=os.environ, start_new_session=True, **pipes) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def script(tmp_path, starter):
    """Runs a script of the project in tmp_path: script("evaluate.py", "run", ...) -> CompletedProcess."""

    def run(
        name: str, *args, processes: int = 1, check: bool = True, **environment
    ) -> subprocess.CompletedProcess:
        env = os.environ | environment
        command = [str(ROOT / name), *map(str, args)]
        if processes > 1:
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            command = [sys.executable, *torchrun, *command]
            run = dict(cwd=tmp_path, env=env, text=True, capture_output=True, timeout=600)
            result = subprocess.run(command, **run)
        else:
            with tempfile.TemporaryDirectory() as folder:
                out, err = Path(folder, "out"), Path(folder, "err")
                request = dict(argv=command, cwd=str(tmp_path), env=env, out=str(out), err=str(err))
                print(json.dumps(request), file=starter.stdin, flush=True)
                if not select.select([starter.stdout], [], [], 600)[0]:
                    os.killpg(starter.pid, signal.SIGKILL)
                    raise TimeoutError(" ".join(command))
                status, texts = int(starter.stdout.readline()), (out.read_bytes(), err.read_bytes())
            result = subprocess.CompletedProcess(command, status, *(text.decode() for text in texts))
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
