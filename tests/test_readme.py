"""What the README says is so: files, line counts, links, imports, flags, commands and snippets."""

import ast
import dataclasses
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import evaluate
import finetune
import pretrain
from finetune import FinetuneConfig
from pretrain import PretrainConfig, parse_config

README = (ROOT / "README.md").read_text()
LEAVES = {"masking", "model", "data"}
GRAPH = {name: set() for name in LEAVES}
GRAPH |= {"evaluate": LEAVES, "pretrain": LEAVES | {"evaluate"}, "finetune": {"model", "data", "evaluate", "pretrain"}}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def commands(program: str) -> list[list[str]]:
    """The README's command lines that run a script of ours, as words."""
    lines = [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines()]
    return [words[words.index(program) :] for words in lines if program in words]


@pytest.mark.parametrize("name", GRAPH)
def test_import_graph(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported & GRAPH.keys() == GRAPH[name]


def test_no_other_module():
    assert {p.stem for p in ROOT.glob("*.py")} == GRAPH.keys()


def test_line_counts():
    for name in GRAPH:
        said = int(re.search(rf"\[`{name}.py`\]\({name}.py\) \| (\d+) \|", README).group(1))
        assert abs(said - len((ROOT / f"{name}.py").read_text().splitlines())) <= 0.05 * said, name


def test_links():
    titles = [re.sub(r"[^\w\- ]", "", title.lower()) for title in re.findall(r"^#+ (.+)$", README, re.M)]
    anchors = {"#" + title.replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target in anchors, target
        elif not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_flags():
    fields = [*dataclasses.fields(PretrainConfig), *dataclasses.fields(FinetuneConfig)]
    known = {field.name for field in fields} | {f"no-{field.name}" for field in fields if field.type is bool}
    known |= set(vars(evaluate.parse_arguments(["CKPT", "x"]))) | set(vars(evaluate.parse_arguments(["plot", "x"])))
    torchrun = {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint"}
    said = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", README))
    assert said <= known | torchrun | {"preset", "help", "max-restarts"}, said - known - torchrun


def test_names_in_backquotes():
    """The functions that the tour of an update names are there."""
    source = "".join((ROOT / f"{name}.py").read_text() for name in GRAPH)
    names = "train_step make_targets inverse_block_mask ufo_loss ema_update sincos_2d spectrogram layer_decay_groups "
    for name in (names + "add_noise sampling_weights").split():
        assert f"`{name}`" in README and f"def {name}(" in source


def test_commands_parse():
    for program, config, presets, least in (
        ("pretrain.py", PretrainConfig, pretrain.PRESETS, 5),
        ("finetune.py", FinetuneConfig, finetune.PRESETS, 5),
    ):
        lines = commands(program)
        assert len(lines) >= least
        for words in lines:
            parse_config(config, presets, words[1:])
    assert len(commands("evaluate.py")) >= 8
    for words in commands("evaluate.py"):
        evaluate.parse_arguments(words[1:])


def test_data_commands_run(tmp_path):
    os.symlink(ROOT / "assets" / "demo" / "prompts", tmp_path / "my_audio")
    lines = commands("data.py")
    assert [words[1] for words in lines] == ["scan", "stats", "pack", "esc50", "speechcommands", "audioset"]
    for words in lines[:3]:  # the others have tests of their own
        subprocess.run([sys.executable, ROOT / words[0], *words[1:]], cwd=tmp_path, check=True, capture_output=True)
    assert Path(tmp_path, "shards", "index.json").exists()


def test_snippets_run(tmp_path, script, monkeypatch):
    """In order, in one session, after two updates of the demo."""
    short = ["--updates", 2, "--warmup", 1, "--batch_size", 4, "--probe_manifest", "", "--probe_test", ""]
    out = script("pretrain.py", "--preset", "demo", *short).stdout
    assert "next: python data.py scan" in out
    os.symlink(ROOT / "assets", tmp_path / "assets")
    monkeypatch.chdir(tmp_path)
    session: dict = {}
    for snippet in blocks("python"):
        exec(snippet, session)
    assert session["mask"].shape == (16, 512) and session["ids_keep"].shape == (16, 102)
    frames = session["spec"].shape[2]
    assert session["tokens"].shape == (1, 1 + frames // 16 * 8, session["encoder"].config.width)
    assert session["ap"].shape == (5,)


def test_the_two_setup_commands():
    """Each is one line that makes the environment; .ci/run types the second."""
    setup = [block for block in blocks("bash") if "venv" in block]
    assert len(setup) == 2 and all(len(block.strip().splitlines()) == 1 for block in setup)
    assert "--preset demo" in setup[0] and setup[1].strip().endswith("-m pytest -q")
    assert "grep --max-count=1 -- '-m pytest' README.md" in (ROOT / ".ci" / "run").read_text()


def test_numbers_of_the_laptop_run():
    """Mean and spread in the README are those of the run's own tables."""
    tables = [json.loads((ROOT / "assets/runs/laptop" / f"{task}.json").read_text()) for task in ("drums", "mandarin")]
    for row, drums in tables[0]["accuracy"].items():
        cells = [
            f"{statistics.mean(scores):.3f} ± {statistics.stdev(scores):.3f}"
            for scores in (drums, tables[1]["accuracy"][row])
        ]
        assert f"| {row} | {cells[0]} | {cells[1]} |" in README
    for log, step, said in (
        ("pretrain1", 1000, ".657"), ("faster_teacher", 1000, ".575"), ("utterance_weight192", 400, ".504"),
        ("utterance_weight192", 200, ".422"), ("pretrain1", 400, ".537"),
    ):  # fmt: skip
        lines = map(json.loads, (ROOT / "assets/runs/laptop" / f"{log}.jsonl").read_text().splitlines())
        score = next(r["probe_linear"] for r in lines if r["step"] == step and "probe_linear" in r)
        assert f"{score:.3f}"[1:] == said and said in README


def test_promises_name_tests_that_exist():
    promised = set(re.findall(r"`(test_\w+)`", README))
    written = set(re.findall(r"^def (test_\w+)", (ROOT / "tests" / "test_faults.py").read_text(), re.M))
    assert promised == written
