"""How much pre-training helps: the table of extras/compare.py, over seeds and folds, and its baseline."""

import dataclasses
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import evaluate
from data import InputError, clip_samples, spectrogram
from evaluate import parse_config, save_checkpoint
from extras import compare
from extras.compare import find_folds, log_mel_statistics
from finetune import PRESETS, FinetuneConfig
from model import EAT, MODELS, Encoder, ModelConfig

CONFIG = dataclasses.replace(MODELS["tiny"], clip_frames=64)
TINY = "--preset esc50 --init pre1.pt --clip_frames 64 --min_samples 1600 --batch_size 8 --workers 0".split()
TINY += "--updates 2 --warmup 1 --lr 2e-3 --log_every 1 --data manifest.tsv --eval_data manifest.tsv".split()
TINY += "--norm_mean -4.268 --norm_std 4.569 --out_dir run".split()  # the checkpoint's
TUNED = "fine-tuned, pre-trained"
PROBED = "linear probe, pre-trained"


def pretrain(path: Path, config: ModelConfig) -> None:
    """A pre-training checkpoint of other weights than those before it."""
    student = EAT(config).state_dict()
    teacher = Encoder(config).state_dict()
    network = dataclasses.asdict(config)
    save_checkpoint(path, step=1, network=network, student=student, teacher=teacher)


@pytest.fixture
def pretrained(folder):
    """pre1.pt and pre2.pt beside the clips."""
    for seed in (1, 2):
        torch.manual_seed(seed)
        pretrain(folder / f"pre{seed}.pt", CONFIG)
    return folder


@pytest.fixture
def here(tune, monkeypatch, tmp_path):
    """Fine-tunes in this process, from the same flags: quicker."""

    def fine_tune(config: FinetuneConfig) -> float:
        assert tune(*compare.flags_of(config)) == 0
        return read_log(tmp_path / config.out_dir)[-1][config.metric]

    monkeypatch.setattr(compare, "fine_tune", fine_tune)


def split_into_folds(folder: Path, names: list[str]) -> None:
    """train{name}.tsv and test{name}.tsv of each name: every so many clips are tested on."""
    root, *lines = (folder / "manifest.tsv").read_text().splitlines()
    for fold, name in enumerate(names):
        tested = lines[fold :: len(names)]
        trained = [line for line in lines if line not in tested]
        (folder / f"train{name}.tsv").write_text("\n".join([root, *trained]) + "\n")
        (folder / f"test{name}.tsv").write_text("\n".join([root, *tested]) + "\n")


def read_log(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]


def read_table(path: Path, metric: str = "accuracy") -> dict[str, list[float]]:
    return json.loads((path / "table.json").read_text())[metric]


@pytest.fixture
def planned(monkeypatch):
    """Nothing is fine-tuned: the settings of what would be, in order. Each has a score of 0.5."""
    seen = []

    def note(config: FinetuneConfig) -> float:
        seen.append(config)
        return 0.5

    monkeypatch.setattr(compare, "fine_tune", note)
    return seen


# --- rows -------------------------------------------------------------------------------------------------


def test_the_baseline_is_the_sound_without_its_padding():
    """Mean and deviation over time of each log-mel band, of the frames that are sound."""
    waveform = torch.randn(2, clip_samples(64)) / 10
    n_samples = torch.tensor([clip_samples(64), clip_samples(40)])
    waveform[1, n_samples[1] :] = 0
    found = log_mel_statistics(spectrogram(waveform, n_samples, -4.268, 4.569))
    for i, n_frames in enumerate((64, 40)):
        alone = waveform[i : i + 1, : n_samples[i]]
        spec = spectrogram(alone, n_samples[i : i + 1], -4.268, 4.569)[0, 0]
        assert len(spec) == n_frames
        expected = torch.cat([spec.mean(0), spec.std(0, correction=0)])
        torch.testing.assert_close(found[i], expected, atol=1e-4, rtol=0)
    silent = spectrogram(torch.zeros(1, clip_samples(64)), torch.tensor([clip_samples(64)]), -4.268, 4.569)
    assert log_mel_statistics(silent).isfinite().all()


@pytest.mark.long
def test_seeds_of_their_own_checkpoints_and_their_spread(pretrained, called, here):
    """Seed n starts from the checkpoint of seed n; the table has mean and sample deviation; from scratch and
    the random encoder are of the checkpoint's size."""
    args = [*TINY, "--init", "pre{seed}.pt", "--model", "base"]
    said = called(compare, *args, "--seeds", 2).stdout
    table = read_table(pretrained / "run")
    probes = [f"linear probe, {of}" for of in ("pre-trained", "random encoder", "log-mel")]
    assert list(table) == [TUNED, "fine-tuned, from scratch", *probes]
    rows = dict(pretrained=TUNED, scratch="fine-tuned, from scratch")
    for i, seed in enumerate((1, 2)):
        expected = dict(
            pretrained=dict(seed=seed, init=f"pre{seed}.pt", model="base"),
            scratch=dict(seed=seed, init="scratch", model="tiny"),
        )
        for name, row in rows.items():
            folder = pretrained / "run" / f"seed{seed}" / name
            assert read_log(folder)[-1]["accuracy"] == table[row][i]
            config = json.loads((folder / "config.json").read_text())
            own = expected[name] | dict(data="manifest.tsv", roll=True, mixup=0.0, clip_frames=64)
            assert {key: config[key] for key in own} == own
        files = (f"pre{seed}.pt", "manifest.tsv", "manifest.tsv")
        alone = json.loads(called(evaluate, *files, "--workers", 0).stdout)
        assert alone["probe_linear"] == table[PROBED][i]
    assert len(set(table["linear probe, log-mel"])) == 1
    for name, scores in table.items():
        each = " ".join(f"{score:.4f}" for score in scores)
        spread = f"{statistics.mean(scores):.4f} ± {statistics.stdev(scores):.4f}"
        assert f"{name:32s} {spread}  ({each})\n" in said


def test_probes_have_the_metric_of_the_run(pretrained, called):
    """All rows of a table have one; as evaluate.py has it where that is accuracy."""
    root, *lines = (pretrained / "manifest.tsv").read_text().splitlines()
    mixed = [root]
    for i, line in enumerate(lines):
        path, n_samples, _ = line.split("\t")
        mixed.append(f"{path}\t{n_samples}\t{('low', 'high')[i % 2]}")
    (pretrained / "mixed.tsv").write_text("\n".join(mixed) + "\n")
    args = [*TINY, "--eval_data", "mixed.tsv", "--rows", "probes"]
    called(compare, *args, "--loss", "bce", "--metric", "mAP")
    by_map = read_table(pretrained / "run", "mAP")
    assert len(by_map) == 3
    assert all(0 < scores[0] < 1 for scores in by_map.values())
    called(compare, *args)
    table = read_table(pretrained / "run")
    result = called(evaluate, "pre1.pt", "manifest.tsv", "mixed.tsv", "--workers", 0)
    assert table[PROBED] == [json.loads(result.stdout)["probe_linear"]] != by_map[PROBED]


def test_the_preset_own_fits_each_checkpoint(pretrained, called, planned):
    """As finetune.py does; whatever {seed} and {fold} stand for, and whichever is the first."""
    shutil.copy(pretrained / "pre2.pt", pretrained / "pre3.pt")
    pretrain(pretrained / "pre2.pt", dataclasses.replace(CONFIG, clip_frames=48, norm_std=3.0))
    for number in (2, 3):
        shutil.copy(pretrained / "manifest.tsv", pretrained / f"list{number}.tsv")
    (pretrained / "pre1.pt").unlink()
    files = "--data list{fold}.tsv --eval_data list{fold}.tsv --workers 0 --out_dir run".split()
    rows = ["--rows", "tuned", "scratch"]
    called(compare, "--preset", "own", "--init", "pre{seed}.pt", "--seed", 2, "--seeds", 2, *files, *rows)
    tuned = planned[::2]
    assert [config.init for config in tuned] == ["pre2.pt", "pre2.pt", "pre3.pt", "pre3.pt"]
    assert [config.data for config in tuned] == ["list2.tsv", "list3.tsv"] * 2
    for config, scratch in zip(tuned, planned[1::2]):
        assert (config.lr, config.loss, config.metric) == (0.2 / 64, "ce", "accuracy")
        fitted = (48, 3.0) if config.init == "pre2.pt" else (64, CONFIG.norm_std)
        assert (config.clip_frames, config.norm_std) == fitted
        changes = dict(init="scratch", model="tiny", out_dir=scratch.out_dir)
        assert scratch == dataclasses.replace(config, **changes)


# --- folds ------------------------------------------------------------------------------------------------


def test_folds_and_their_mean(pretrained, called, monkeypatch):
    """Each fold is trained and tested on its own manifests. Two seeds that have .2 and .4, .5 and .9 on two
    folds have means of .3 and .7, which is .5 on average, and .2828 is their deviation."""
    split_into_folds(pretrained, ["0", "1"])
    scores = {"seed1/fold0": 0.2, "seed1/fold1": 0.4, "seed2/fold0": 0.5, "seed2/fold1": 0.9}
    done = []

    def fine_tune(config: FinetuneConfig) -> float:
        done.append((config.out_dir, config.data, config.eval_data, config.seed))
        return scores[config.out_dir.removeprefix("run/").removesuffix("/pretrained")]

    monkeypatch.setattr(compare, "fine_tune", fine_tune)
    args = [*TINY, "--data", "train{fold}.tsv", "--eval_data", "test{fold}.tsv"]
    said = called(compare, *args, "--seeds", 2, "--rows", "tuned", "probes").stdout
    expected = []
    for seed in (1, 2):
        for fold in (0, 1):
            out_dir = f"run/seed{seed}/fold{fold}/pretrained"
            expected.append((out_dir, f"train{fold}.tsv", f"test{fold}.tsv", seed))
    assert done == expected
    table = read_table(pretrained / "run")
    assert f"{TUNED:32s} 0.5000 ± 0.2828  (0.2000 0.4000 0.5000 0.9000)\n" in said
    assert said.startswith("folds: 0 1\n")
    assert table[TUNED] == [0.2, 0.4, 0.5, 0.9]
    for fold in (0, 1):  # both seeds start from the same checkpoint here
        files = ("pre1.pt", f"train{fold}.tsv", f"test{fold}.tsv", "--workers", 0)
        alone = json.loads(called(evaluate, *files).stdout)["probe_linear"]
        assert table[PROBED][fold::2] == [alone, alone]


def test_ten_padded_folds_are_ten(pretrained, called, planned):
    """01 to 10, with the name twice in the path and in --init, in the order of their numbers."""
    names = [f"{number:02d}" for number in range(1, 11)]
    for name in names:
        (pretrained / f"fold{name}").mkdir()
        for part in ("train", "test"):
            shutil.copy(pretrained / "manifest.tsv", pretrained / f"fold{name}" / f"{part}_{name}.tsv")
        shutil.copy(pretrained / "pre1.pt", pretrained / f"{name}.pt")
    files = ["--data", "fold{fold}/train_{fold}.tsv", "--eval_data", "fold{fold}/test_{fold}.tsv"]
    said = called(compare, *TINY, *files, "--init", "{fold}.pt", "--rows", "tuned").stdout
    assert said.startswith("folds: 01 02 03 04 05 06 07 08 09 10\n")
    assert [config.data for config in planned] == [f"fold{name}/train_{name}.tsv" for name in names]
    assert [config.eval_data for config in planned] == [f"fold{name}/test_{name}.tsv" for name in names]
    assert [config.init for config in planned] == [f"{name}.pt" for name in names]
    assert [config.out_dir for config in planned] == [f"run/fold{name}/pretrained" for name in names]


@pytest.mark.parametrize("names, pattern, folds", [
    (["a1.tsv", "a2.tsv", "a10.tsv", "a9.tsv"], "a{fold}.tsv", ["1", "2", "9", "10"]),
    (["a1.tsv", "a2.tsv", "a_all.tsv", "a2.tsv.bad"], "a{fold}.tsv", ["1", "2"]),
    (["aX.tsv", "aY.tsv"], "a{fold}.tsv", ["X", "Y"]),
    (["1/x1.tsv", "1/x2.tsv", "2/x2.tsv"], "{fold}/x{fold}.tsv", ["1", "2"]),
    (["[a]1+.tsv", "[a]2+.tsv", "a1.tsv"], "[a]{fold}+.tsv", ["1", "2"]),
    (["b1.tsv"], "a{fold}.tsv", []),
])  # fmt: skip
def test_what_stands_for_a_fold(tmp_path, monkeypatch, names, pattern, folds):
    """Numbers in their order; if there are none, text; the same in every place; other characters as such."""
    monkeypatch.chdir(tmp_path)
    for name in names:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    found = find_folds(pattern)
    assert list(found) == folds
    assert list(found.values()) == [pattern.replace("{fold}", fold) for fold in folds]


@pytest.mark.parametrize("train, test, pattern, message", [
    ("1 2 4", "1 2 4", "train{fold}.tsv", "train{fold}.tsv has no fold 3, but 1, 2, 4"),
    ("01 02 04 07", "01 02 04 07", "train{fold}.tsv", "train{fold}.tsv has no fold 3, 5, 6, but 01, 02"),
    ("1 2 3", "1 3", "train{fold}.tsv", "test{fold}.tsv has no fold 2, which the other manifests have"),
    ("1 2", "1 2 3 4", "train{fold}.tsv", "train{fold}.tsv has no fold 3, 4, which the other manifests have"),
    ("01 02", "1 2", "train{fold}.tsv", "train{fold}.tsv has no fold 1, 2, which the other manifests have"),
    ("1 2", "", "train{fold}.tsv", "test{fold}.tsv has no fold 1, 2, which the other manifests have"),
    ("1", "1", "train{fold}.tsv", "train{fold}.tsv: {fold} must stand for two folds at least, found 1"),
    ("", "", "train{fold}.tsv", "train{fold}.tsv: {fold} must stand for two folds at least, found 0"),
    ("1 01 2", "1 01 2", "train{fold}.tsv", "train{fold}.tsv has a fold twice, such as 1 and 01: 01, 1, 2"),
    ("08 09 10", "8 9", "train0{fold}.tsv", "leaves out train10.tsv: train{fold}.tsv finds all folds"),
])  # fmt: skip
def test_missing_folds_are_named(pretrained, called, planned, train, test, pattern, message):
    for name in train.split():
        shutil.copy(pretrained / "manifest.tsv", pretrained / f"train{name}.tsv")
    for name in test.split():
        shutil.copy(pretrained / "manifest.tsv", pretrained / f"test{name}.tsv")
    result = called(compare, *TINY, "--data", pattern, "--eval_data", "test{fold}.tsv", check=False)
    assert result.returncode == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not planned
    assert not (pretrained / "run").exists()


def test_folds_of_the_training_data_alone(pretrained, called, planned):
    """As many trainings, all tested on the same clips."""
    split_into_folds(pretrained, ["1", "2", "3"])
    called(compare, *TINY, "--data", "train{fold}.tsv", "--rows", "tuned")
    assert [config.data for config in planned] == ["train1.tsv", "train2.tsv", "train3.tsv"]
    assert {config.eval_data for config in planned} == {"manifest.tsv"}


# --- fine-tunings as processes ----------------------------------------------------------------------------


@pytest.mark.long
def test_stopped_among_several_seeds_it_goes_on_there(pretrained, called):
    """Ctrl-C, or a signal to the command alone: the fine-tuning saves, the exit status says so, there is
    no table yet; started again, the first seed goes on and the second follows."""
    args = [*TINY, "--seeds", 2, "--rows", "tuned", "--updates", 60, "--save_every", 1000]
    folders = [pretrained / "run" / f"seed{seed}" / "pretrained" for seed in (1, 2)]
    for number, is_to_all in ((signal.SIGINT, True), (signal.SIGTERM, False)):
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "extras" / "compare.py"), *map(str, args)], cwd=pretrained, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        line = ""
        while not line.startswith("step"):
            line = process.stdout.readline()
            assert line, process.stderr.read()
        if is_to_all:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        said, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + number, errors
        assert "Traceback" not in errors
        assert f"stopped by {number.name}; the same command resumes" in said
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
        assert (folders[0] / "last.pt").exists()
        assert not (pretrained / "run" / "table.json").exists()
        assert not folders[1].exists()
    called(compare, *args)
    assert len(read_table(pretrained / "run")[TUNED]) == 2
    for folder in folders:
        steps = [record["step"] for record in read_log(folder) if "loss" in record]
        assert steps == list(range(1, 61))


def test_a_fine_tuning_that_fails_ends_the_command_with_its_words(pretrained, script):
    """As a process: run_script closes a file descriptor that its children would inherit."""
    (pretrained / "run" / "pretrained").mkdir(parents=True)
    (pretrained / "run" / "pretrained" / "mine.txt").write_text("not a run")
    result = script("extras/compare.py", *TINY, "--rows", "tuned", check=False)
    said = "finetune.py: run/pretrained is not empty and holds no run: choose another --out_dir\n"
    assert result.returncode == 1
    assert result.stderr == said
    assert not (pretrained / "run" / "table.json").exists()


def test_a_finished_fine_tuning_is_not_made_again(pretrained, called, tune):
    """Its score is that of the last evaluation in its log."""
    args = [*TINY, "--rows", "tuned"]
    assert tune(*TINY, "--out_dir", "run/pretrained") == 0
    run = pretrained / "run" / "pretrained"
    made = (run / "last.pt").stat().st_mtime_ns
    with open(run / "log.jsonl", "ab") as log:
        log.write(b'null\n[1]\n7\n"x"\n\xff\n{"accuracy": null}\n')
    said = called(compare, *args).stdout
    assert "run/pretrained, from update 2: " in said
    assert (run / "last.pt").stat().st_mtime_ns == made
    assert read_table(pretrained / "run")[TUNED] == [read_log(run)[-1]["accuracy"]]


def test_flags_have_all_settings():
    """Whatever their type and preset."""
    for preset in PRESETS.values():
        config = FinetuneConfig(**preset | dict(frozen=True, roll=False, init="a b.pt", lr=1e-07))
        assert parse_config(FinetuneConfig, PRESETS, compare.flags_of(config)) == config


def test_fine_tuning_alone_takes_a_network_of_any_size(pretrained, called, planned):
    """Only what is from scratch must be one of the models."""
    pretrain(pretrained / "odd.pt", dataclasses.replace(CONFIG, depth=3))
    called(compare, *TINY, "--init", "odd.pt", "--rows", "tuned")
    assert read_table(pretrained / "run") == {TUNED: [0.5]}


# --- what is refused --------------------------------------------------------------------------------------


def test_the_demos_table_is_the_default(tmp_path, called):
    """Its data are there, and its checkpoint is the demo's, which has to be made first."""
    config = parse_config(FinetuneConfig, dict(demo=PRESETS["demo"]) | PRESETS, [])
    assert os.path.exists(config.data)
    assert os.path.exists(config.eval_data)
    assert config.init == "runs/demo"
    result = called(compare, check=False)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "there is no" in result.stderr
    assert "runs/demo" in result.stderr


@pytest.mark.parametrize("args, message", [
    (["--init", "scratch"], "--init must be a checkpoint"),
    (["--init", ""], "--init is missing: a checkpoint, or scratch"),
    (["--init", "nothing.pt"], "there is no file nothing.pt"),
    (["--data", ""], "--data is missing: a labelled manifest"),
    (["--eval_data", ""], "--eval_data is missing: a labelled manifest"),
    (["--seeds", "0"], "--seeds counts from 1"),
    (["--seeds", "3", "--init", "pre{seed}.pt"], "there is no file pre3.pt"),
    (["--init", "odd.pt"], "odd.pt has the size of none of the models base, large"),
    (["--lr", "nan"], "--lr nan is too small or not finite"),
    (["--rows", "knn"], "invalid choice: 'knn'"),
    (["--speed", "3"], "unrecognized arguments: --speed 3"),
])  # fmt: skip
def test_refusals_are_one_line_before_anything_runs(pretrained, called, planned, args, message):
    """What the last seed or fold lacks is told before the first has run."""
    pretrain(pretrained / "odd.pt", dataclasses.replace(CONFIG, depth=3))
    result = called(compare, *TINY, *args, check=False)
    assert result.returncode == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not planned
    assert not (pretrained / "run").exists()


def test_several_processes_are_refused_at_once(pretrained, called, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    result = called(compare, *TINY, check=False)
    assert result.returncode == 1
    assert "this needs one process, but WORLD_SIZE is 2" in result.stderr
    with pytest.raises(InputError):
        evaluate.init_distributed(alone=True)
