"""Fixtures shared by the tests: small audio files made from a formula, and a quick way to run a script."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch

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


@pytest.fixture
def script(tmp_path):
    """Runs a script of the project in tmp_path: script("data.py", "scan", ...) -> CompletedProcess with text output."""

    def run(name: str, *args, processes: int = 1, check: bool = True) -> subprocess.CompletedProcess:
        launcher = (
            ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
        )
        result = subprocess.run(
            [sys.executable, *launcher, str(ROOT / name), *map(str, args)],
            cwd=tmp_path, text=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=600,
        )  # fmt: skip
        assert not check or result.returncode == 0, result.stdout + result.stderr
        return result

    return run
