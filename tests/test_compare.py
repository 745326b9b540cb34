"""What pre-training is worth: the table of extras/compare.py, over seeds and folds, and its baseline."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT

import compare
import evaluate
import released
from compare import log_mel_statistics
from data import clip_samples, spectrogram
from evaluate import parse_config
from finetune import PRESETS, FinetuneConfig
from model import EAT, MODELS, Encoder, save_checkpoint

CONFIG = dataclasses.replace(MODELS["tiny"], clip_frames=64)
TINY = "--preset esc50 --init pre1.pt --clip_frames 64 --min_samples 1600 --batch_size 8 --workers 0".split()
TINY += "--updates 2 --warmup 1 --lr 2e-3 --log_every 1 --data manifest.tsv --eval_data manifest.tsv".split()
TINY += "--norm_mean -4.268 --norm_std 4.569 --out_dir run".split()  # the checkpoint's


@pytest.fixture
def pretrained(folder):
    """Pre-training checkpoints pre1.pt, pre2.pt of other weights, beside the clips."""
    for seed in (1, 2):
        torch.manual_seed(seed)
        student = EAT(CONFIG)
        state = dict(student=student.state_dict(), teacher=Encoder(CONFIG).state_dict())
        save_checkpoint(folder / f"pre{seed}.pt", step=1, network=dataclasses.asdict(CONFIG), **state)
    return folder


def read_log(path) -> list[dict]:
    return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]


def read_table(path, metric: str = "accuracy") -> dict[str, list[float]]:
    return json.loads((path / "table.json").read_text())[metric]


def test_the_baseline_is_the_sound_without_its_padding():
    """Mean and std over time of each log-mel band, of the frames that are sound."""
    waveform = torch.randn(2, clip_samples(64)) / 10
    n_samples = torch.tensor([clip_samples(64), clip_samples(40)])
    waveform[1, n_samples[1] :] = 0
    found = log_mel_statistics(spectrogram(waveform, n_samples, -4.268, 4.569))
    for i, n_frames in enumerate((64, 40)):
        alone = spectrogram(waveform[i : i + 1, : n_samples[i]], n_samples[i : i + 1], -4.268, 4.569)[0, 0]
        assert len(alone) == n_frames
        expected = torch.cat([alone.mean(0), alone.std(0, correction=0)])
        assert torch.allclose(found[i], expected, atol=1e-4)


def test_seeds_of_their_own_checkpoints_and_their_spread(pretrained, called):
    """Seed n starts from the checkpoint of seed n; the table has mean and sample deviation; from scratch and
    the random encoder are of the checkpoint's size."""
    args = [*TINY, "--init", "pre{seed}.pt", "--model", "base"]
    said = called(compare, *args, "--seeds", 2).stdout
    table = read_table(pretrained / "run")
    kinds = "pre-trained", "random encoder", "log-mel"
    probes = [f"{kind} probe, {of}" for of in kinds for kind in ("linear", "knn")]
    assert [*table] == ["fine-tuned, pre-trained", "fine-tuned, from scratch", *probes]
    assert all(len(scores) == 2 for scores in table.values())
    for i, seed in enumerate((1, 2)):
        rows = dict(pretrained="fine-tuned, pre-trained", scratch="fine-tuned, from scratch")
        for name, row in rows.items():
            folder = pretrained / "run" / f"seed{seed}" / name
            assert read_log(folder)[-1]["accuracy"] == table[row][i]
            config = json.loads((folder / "config.json").read_text())
            assert config["seed"] == seed and config["model"] == ("base" if name == "pretrained" else "tiny")
            assert config["init"] == (f"pre{seed}.pt" if name == "pretrained" else "scratch")
            assert (config["data"], config["roll"], config["mixup"]) == ("manifest.tsv", True, 0.0)
        files = (f"pre{seed}.pt", "manifest.tsv", "manifest.tsv")
        alone = json.loads(called(evaluate, *files, "--workers", 0).stdout)
        assert alone["probe_linear"] == table["linear probe, pre-trained"][i]
        assert alone["probe_knn"] == table["knn probe, pre-trained"][i]
    assert len(set(table["linear probe, log-mel"])) == 1
    for name, scores in table.items():
        assert f"{name:32s} {np.mean(scores):.4f} ± {np.std(scores, ddof=1):.4f}" in said


def test_the_preset_own_fits_the_checkpoint(pretrained, called, monkeypatch):
    """As finetune.py does; whatever {seed} and {fold} stand for, and whichever is the first."""
    seen = []
    monkeypatch.setattr(compare, "fine_tune", lambda config: seen.append(config) or 0.5)
    for number in (2, 3):
        shutil.copy(pretrained / "pre1.pt", pretrained / f"pre{number}.pt")
        shutil.copy(pretrained / "manifest.tsv", pretrained / f"list{number}.tsv")
    (pretrained / "pre1.pt").unlink()
    files = "--data list{fold}.tsv --eval_data list{fold}.tsv --workers 0 --rows tuned --out_dir run".split()
    called(compare, "--preset", "own", "--init", "pre{seed}.pt", "--seed", 2, "--seeds", 2, *files)
    assert [config.init for config in seen] == ["pre2.pt", "pre2.pt", "pre3.pt", "pre3.pt"]
    assert [config.data for config in seen] == ["list2.tsv", "list3.tsv"] * 2
    assert {(config.clip_frames, config.lr, config.loss) for config in seen} == {(64, 0.2 / 64, "ce")}


def test_folds_and_their_mean(pretrained, called, monkeypatch):
    """Each fold is trained and tested on its own manifests. Two seeds that have .2 and .4, .5 and .9 on two
    folds have means of .3 and .7, which is .5 on average, and .2828 is their deviation."""
    root, *lines = (pretrained / "manifest.tsv").read_text().splitlines()
    for fold in (0, 1):
        for part in ("train", "test"):
            own = [line for i, line in enumerate(lines) if (i % 2 == fold) == (part == "test")]
            (pretrained / f"{part}{fold}.tsv").write_text("\n".join([root, *own]) + "\n")
    scores, done = {"seed1/fold0": 0.2, "seed1/fold1": 0.4, "seed2/fold0": 0.5, "seed2/fold1": 0.9}, []

    def fine_tune(config: FinetuneConfig) -> float:
        done.append((config.out_dir, config.data, config.eval_data, config.seed))
        return scores[config.out_dir.removeprefix("run/").removesuffix("/pretrained")]

    monkeypatch.setattr(compare, "fine_tune", fine_tune)
    args = [*TINY, "--data", "train{fold}.tsv", "--eval_data", "test{fold}.tsv"]
    said = called(compare, *args, "--seeds", 2, "--rows", "tuned", "probes").stdout
    assert done == [
        (f"run/seed{seed}/fold{fold}/pretrained", f"train{fold}.tsv", f"test{fold}.tsv", seed)
        for seed in (1, 2) for fold in (0, 1)
    ]  # fmt: skip
    name, table = "fine-tuned, pre-trained", read_table(pretrained / "run")
    assert f"{name:32s} 0.5000 ± 0.2828  (0.2000 0.4000 0.5000 0.9000)\n" in said
    assert table[name] == [0.2, 0.4, 0.5, 0.9]
    for fold in (0, 1):  # numbered from 0 as well as from 1; both seeds start from the same checkpoint here
        files = ("pre1.pt", f"train{fold}.tsv", f"test{fold}.tsv", "--workers", 0)
        alone = json.loads(called(evaluate, *files).stdout)["probe_linear"]
        assert table["linear probe, pre-trained"][fold::2] == [alone, alone]


def test_probes_alone_in_any_layout_and_metric(pretrained, called, monkeypatch):
    """A checkpoint has the same probes as exported to released files; all rows have the run's metric."""
    monkeypatch.chdir(pretrained)
    released.export("pre1.pt", "exported")
    root, *lines = (pretrained / "manifest.tsv").read_text().splitlines()
    mixed = [f"{line.rsplit(chr(9), 1)[0]}\t{('low', 'high')[i % 2]}" for i, line in enumerate(lines)]
    (pretrained / "mixed.tsv").write_text("\n".join([root, *mixed]) + "\n")
    tables, alone = [], []
    args = [*TINY, "--eval_data", "mixed.tsv", "--rows", "probes"]
    for init in ("pre1.pt", "exported", "exported/fairseq.pt"):
        called(compare, *args, "--init", init, "--loss", "bce", "--metric", "mAP")
        tables.append(read_table(pretrained / "run", "mAP"))
        result = called(evaluate, init, "manifest.tsv", "mixed.tsv", "--workers", 0)
        alone.append(json.loads(result.stdout))
    assert tables[0] == tables[1] == tables[2] and alone[0] == alone[1] == alone[2]
    assert len(tables[0]) == 6 and all(0 < scores[0] < 1 for scores in tables[0].values())
    called(compare, *args)
    table = read_table(pretrained / "run")  # accuracy, as evaluate.py has it where a clip has one class
    for kind in ("linear", "knn"):
        name = f"{kind} probe, pre-trained"
        assert table[name] == [alone[0][f"probe_{kind}"]] and table[name] != tables[0][name]


@pytest.mark.long
def test_stopped_among_several_seeds_it_goes_on_there(pretrained, called):
    """Ctrl-C, or a signal to the command alone: the fine-tuning saves, the exit status says so, there is
    no table yet; started again, the first seed goes on and the second follows."""
    args = [*TINY, "--seeds", 2, "--rows", "tuned", "--updates", 20, "--save_every", 1000]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "extras" / "compare.py"), *map(str, args)], cwd=pretrained, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    folders = [pretrained / "run" / f"seed{seed}" / "pretrained" for seed in (1, 2)]
    end = time.time() + 120
    while not (folders[0] / "log.jsonl").exists() and time.time() < end and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said, said
    assert (folders[0] / "last.pt").exists() and not (pretrained / "run" / "table.json").exists()
    assert not folders[1].exists()
    assert "resuming at update" in called(compare, *args).stdout
    assert len(read_table(pretrained / "run")["fine-tuned, pre-trained"]) == 2
    assert [read_log(folder)[-1]["step"] for folder in folders] == [20, 20]


def test_the_demos_table_is_the_default(tmp_path, called):
    """Its data are there, and its checkpoint is the demo's, which has to be made first."""
    config = parse_config(FinetuneConfig, dict(demo=PRESETS["demo"]) | PRESETS, [])
    assert os.path.exists(config.data) and os.path.exists(config.eval_data) and config.init == "runs/demo"
    result = called(compare, check=False)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "there is no runs/demo yet: run python pretrain.py --preset demo first" in result.stderr


@pytest.mark.parametrize(
    "args, message",
    [
        (["--init", "scratch"], "--init must be a checkpoint"),
        (["--init", ""], "--init is missing: a checkpoint, or scratch"),
        (["--init", "nothing.pt"], "there is no file nothing.pt"),
        (["--seeds", "0"], "--seeds counts from 1"),
        (["--seeds", "3", "--init", "pre{seed}.pt"], "there is no file pre3.pt"),
        (["--init", "odd.pt"], "odd.pt has the size of none of the models base, large"),
        (["--data", "train{fold}.tsv"], "train{fold}.tsv: {fold} must stand for two folds at least"),
        (["--data", "gap{fold}.tsv", "--eval_data", "gap{fold}.tsv"], "cannot read the manifest gap3.tsv"),
        (["--lr", "0"], "--lr must be a number above 0"),
        (["--speed", "3"], "unrecognized arguments: --speed 3"),
    ],
)
def test_refusals_are_one_line_before_anything_runs(pretrained, called, monkeypatch, args, message):
    """What the last seed or fold lacks is told before the first has run."""
    monkeypatch.setattr(compare, "fine_tune", lambda config: pytest.fail("it runs"))
    odd = dataclasses.replace(CONFIG, depth=3)
    state = dict(student=EAT(odd).state_dict(), teacher=Encoder(odd).state_dict())
    save_checkpoint(pretrained / "odd.pt", network=dataclasses.asdict(odd), **state)
    for fold in (1, 2, 4):
        (pretrained / f"gap{fold}.tsv").write_text((pretrained / "manifest.tsv").read_text())
    result = called(compare, *TINY, *args, check=False)
    assert result.returncode in (1, 2) and message in result.stderr and result.stderr.count("\n") == 1
    assert not (pretrained / "run").exists()


def test_fine_tuning_alone_takes_a_network_of_any_size(pretrained, called, monkeypatch):
    """Only what is from scratch must be one of the models. And a fine-tuning that fails ends the command."""
    odd = dataclasses.replace(CONFIG, depth=3)
    state = dict(student=EAT(odd).state_dict(), teacher=Encoder(odd).state_dict())
    save_checkpoint(pretrained / "odd.pt", network=dataclasses.asdict(odd), **state)
    monkeypatch.setattr(compare, "fine_tune", lambda config: 0.25)
    called(compare, *TINY, "--init", "odd.pt", "--rows", "tuned")
    assert read_table(pretrained / "run") == {"fine-tuned, pre-trained": [0.25]}
    monkeypatch.undo()
    (pretrained / "run" / "pretrained").mkdir()
    (pretrained / "run" / "pretrained" / "mine.txt").write_text("not a run")
    (pretrained / "run" / "table.json").unlink()
    result = called(compare, *TINY, "--rows", "tuned", check=False)
    assert result.returncode == 1 and "is not empty and holds no run" in result.stderr
    assert result.stderr.count("\n") == 1 and not (pretrained / "run" / "table.json").exists()
