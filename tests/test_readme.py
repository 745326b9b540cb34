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
from bench import update_flops
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
    assert said <= known | torchrun | {"preset", "help", "max-restarts", "labels"}, said - known - torchrun


def test_names_in_backquotes():
    """The functions that the tables name are there."""
    source = "".join((ROOT / f"{name}.py").read_text() for name in GRAPH)
    names = "make_targets inverse_block_mask ufo_loss ema_update sincos_2d spectrogram layer_decay_groups add_noise "
    for name in (names + "sampling_weights").split():
        assert f"`{name}`" in README and f"def {name}(" in source


def test_commands_parse():
    for program, config, presets, least in (
        ("pretrain.py", PretrainConfig, pretrain.PRESETS, 5),
        ("finetune.py", FinetuneConfig, finetune.PRESETS, 5),
    ):
        lines = commands(program)
        assert len(lines) >= least
        for words in lines:
            settings = parse_config(config, presets, words[1:])
            if program == "pretrain.py":
                pretrain.check_config(settings, world=1)
    assert len(commands("evaluate.py")) >= 8
    for words in commands("evaluate.py"):
        evaluate.parse_arguments(words[1:])


def test_data_commands_run(tmp_path):
    os.symlink(ROOT / "assets" / "demo" / "prompts", tmp_path / "my_audio")
    (tmp_path / "sorted").mkdir()
    for part in ("train", "test"):
        os.symlink(ROOT / "assets" / "demo" / "syllables", tmp_path / "sorted" / part)
    lines = commands("data.py")
    named = ["scan", "scan", "scan", "scan", "stats", "pack", "esc50", "speechcommands", "audioset"]
    assert [words[1] for words in lines] == named
    for words in lines[:6]:  # the others have tests of their own
        subprocess.run([sys.executable, ROOT / words[0], *words[1:]], cwd=tmp_path, check=True, capture_output=True)
    assert Path(tmp_path, "shards", "index.json").exists()


def test_snippets_run(tmp_path, script, monkeypatch):
    """In order, in one session, after two updates of the demo."""
    short = ["--updates", 2, "--warmup", 1, "--batch_size", 4, "--probe_manifest", "", "--probe_test", ""]
    out = script("pretrain.py", "--preset", "demo", *short).stdout
    assert "next: python data.py scan" in out
    os.symlink(ROOT / "assets", tmp_path / "assets")
    os.symlink(ROOT / "tests" / "golden" / "hf_finetuned", tmp_path / "EAT-base_finetune_AS2M")
    monkeypatch.chdir(tmp_path)
    session: dict = {}
    for snippet in blocks("python"):
        exec(snippet, session)
    assert session["probabilities"].shape == (1, len(session["model"].classes))
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


def test_numbers_of_the_ablations():
    """Every cell of the table is made of the runs' scores; each run has its log."""
    folder = ROOT / "assets/runs/ablations"
    found = json.loads((folder / "ablations.json").read_text())

    def cell(scores: list[float]) -> str:
        return f"{statistics.mean(scores):.3f} ± {(max(scores) - min(scores)) / 2:.3f}"

    tuned = found.pop("fine_tuned")
    assert f"{cell(tuned['mean'])} against {cell(tuned['cls'])}" in README
    rows = [(name, runs, "linear") for axis in found.values() for name, runs in axis.items()]
    base = found["utterance weight"]["1"]
    rows += [("CLS", base, "linear, CLS"), ("mean patch", base, "linear, mean"), ("both", base, "linear")]
    for name, runs, probe in rows:
        cells = (cell([run[task][probe] for run in runs]) for task in ("drums", "mandarin", "events"))
        assert f"| {name} | {' | '.join(cells)} |" in README
    gains = [
        run[task]["linear"] - axis["untrained"][seed][task]["linear"]
        for axis in found.values() for name in axis.keys() - {"untrained"}
        for seed, run in enumerate(axis[name]) for task in ("drums", "mandarin", "events")
    ]  # fmt: skip
    assert 0.01 < min(gains) < 0.02 and 0.23 < max(gains) < 0.24 and "by 1 to 23 points" in README
    assert len(list(folder.glob("*.jsonl"))) == 28


def test_numbers_of_the_bench():
    found = json.loads((ROOT / "assets/runs/speed/cpu.json").read_text())
    for key, form in (
        ("update (s)", "{:.2f} s"), ("update (GFLOP/s)", "{:.0f} GFLOP/s"), ("update / matrix product", "{:.2f} "),
        ("peak memory (GiB)", "{:.2f} GiB"), ("decoding flac alone, one process (clips/s)", "{:.0f} clips/s"),
        ("loader, flac files, 2 workers (clips/s)", "{:.0f} clips/s"),
        ("loader, packed, 2 workers (clips/s)", "{:.0f} clips/s"), ("2,000,000 lines: opening (s)", "{:.1f} s"),
        ("2,000,000 lines: memory that a worker adds (MiB)", "{:.1f} MiB"),
    ):  # fmt: skip
        assert f"| {form.format(found[key])}" in README, key
    first = found["DDP: the first part starts after this share of the backward"]
    last = found["DDP: the last part starts after this share of the backward"]
    assert f"starts after {first:.0%}".replace("%", " %") in README and f"the last after {last:.0%}"[:-1] in README
    per_update = found["DDP: gradients averaged in an update (MB)"]
    assert all(f"{2 * (n - 1) / n * per_update:.0f} MB with {n}" in README for n in (4, 64))


def test_the_arithmetic_of_an_update():
    flops = update_flops(dataclasses.replace(PretrainConfig(), batch_size=12))
    for part, count in flops.items():
        assert re.search(rf"^{part} .* {count / 1e12:.2f} TFLOP$", README, re.M), part
    total = sum(flops.values())
    assert f"{total / 1e12:.2f} TFLOP" in README and f"{total * 4 * 400_000:.2e}".replace("e+", "e") in README
    for card, peak in (("RTX 3090", 71), ("A100", 312), ("H200", 989)):
        hours = [total * 400_000 / (share * peak * 1e12) / 3600 for share in (0.35, 0.5)]
        cells = [f"{h:.1f}" if h < 10 else f"{h:.0f}" for h in hours]
        assert f"| {card} | {peak} TFLOP/s | {cells[0]} h | {cells[1]} h |" in README


def test_the_method_is_quoted_from_the_files():
    """Each line of the forty stands in the file that the comment above it names."""

    def bare(line: str) -> str:
        return line.split("  #")[0].strip()

    (excerpt,) = blocks("py")
    code = [line for line in excerpt.splitlines() if line.strip()]
    assert 30 <= sum(not line.startswith("#") for line in code) <= 45
    for line in code:
        if line.startswith("#"):
            name, function = re.match(r"# (\w+\.py), (?:\w+\.)?(\w+)", line).groups()
            source = (ROOT / name).read_text()
            lines = {bare(some) for some in source.splitlines()}
            assert f"def {function}(" in source, line
        else:
            assert bare(line) in lines, line


def test_promises_name_tests_that_exist():
    promised = set(re.findall(r"`(test_\w+)`", README))
    written = set(re.findall(r"^def (test_\w+)", (ROOT / "tests" / "test_faults.py").read_text(), re.M))
    assert promised == written
