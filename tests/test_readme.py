"""What the README and the texts in extras/ say is so: sizes, links, flags, commands, snippets, numbers."""

import ast
import dataclasses
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tarfile
from pathlib import Path

import ablations
import laptop
import pytest
import torch
from bench import update_flops
from conftest import ROOT

import evaluate
import finetune
import pretrain
from evaluate import parse_config
from finetune import FinetuneConfig
from model import MODELS
from extras import compare, export, listen, plot, prepare, released
from pretrain import PretrainConfig

README = (ROOT / "README.md").read_text()
TEXTS = {path: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "extras").rglob("*.md"))]}
LEAVES = {"masking", "model", "data"}
GRAPH = {"masking": set(), "model": set(), "data": set(), "evaluate": {"model", "data"}}
GRAPH |= {"pretrain": LEAVES | {"evaluate"}, "finetune": {"model", "data", "evaluate", "pretrain"}}
SCRIPTS = dict(prepare=prepare, released=released, plot=plot, compare=compare, listen=listen)
RUNS = ROOT / "extras" / "runs"


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def commands(program: str) -> list[list[str]]:
    """The command lines in all texts that run a script of ours, as words, without the program."""
    lines = [line for text in TEXTS.values() for block in blocks("bash", text) for line in block.splitlines()]
    words = [shlex.split(line.split(" > ")[0], comments=True) for line in lines]
    return [line[line.index(program) + 1 :] for line in words if program in line]


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines()


# --- sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRAPH)
def test_no_function_is_long(name):
    """60 lines at most; `train`, the story of a run, may have 90."""
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        if isinstance(node, ast.FunctionDef):
            limit = 90 if node.name == "train" else 60
            assert node.end_lineno - node.lineno + 1 <= limit, node.name


@pytest.mark.parametrize("name", GRAPH)
def test_import_graph(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    for node in ast.walk(tree):
        imported |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
    assert imported & GRAPH.keys() == GRAPH[name]


# --- words -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links(path):
    titles = [re.sub(r"[^\w\- ]", "", title.lower()) for title in re.findall(r"^#+ (.+)$", TEXTS[path], re.M)]
    anchors = {"#" + title.replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\(([^)]+)\)", TEXTS[path]):
        if target.startswith("#"):
            assert target in anchors, target
        elif not target.startswith("http"):
            assert (path.parent / target).exists(), target


def flags_of(parser_of_help: str) -> set[str]:
    return set(re.findall(r"--([a-z][\w-]*)", parser_of_help))


def test_flags(monkeypatch, capsys):
    """Every flag that a text names is one of a script's."""
    fields = [*dataclasses.fields(PretrainConfig), *dataclasses.fields(FinetuneConfig)]
    known = {field.name for field in fields} | {f"no-{field.name}" for field in fields if field.type is bool}
    known |= {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "max-restarts"}  # torchrun's
    known |= set("preset help model sets from cache json extra-index-url repo-type include local-dir".split())
    for module in (*SCRIPTS.values(), evaluate):
        for command in ("scan", "stats", "pack") if module is prepare else ("",):
            monkeypatch.setattr(sys, "argv", [module.__name__, *filter(None, [command]), "--help"])
            with pytest.raises(SystemExit):
                module.main()
            known |= flags_of(capsys.readouterr().out)
    paths = (ROOT / "tests" / "bench.py", RUNS / "ablations.py", RUNS / "laptop.py")
    known |= flags_of("".join(path.read_text() for path in paths))
    for path, text in TEXTS.items():
        said = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", text))
        assert said <= known, (path, said - known)


def test_names_in_backquotes():
    """The functions that the table of differences names are there."""
    source = "".join((ROOT / f"{name}.py").read_text() for name in GRAPH)
    text = TEXTS[ROOT / "extras" / "differences.md"]
    for name in "sincos_2d spectrogram layer_decay_groups add_noise sampling_weights make_targets".split():
        assert f"`{name}`" in text and f"def {name}(" in source, name


def test_the_method_is_quoted_from_the_files():
    """Each line of the method stands in the file and function that the comment above it names."""

    def bare(line: str) -> str:
        return line.split("  #")[0].strip()

    (excerpt,) = blocks("py")
    code = [line for line in excerpt.splitlines() if line.strip()]
    assert 10 <= sum(not line.startswith("#") for line in code) <= 25
    for line in code:
        if line.startswith("#"):
            name, owner, function = re.match(r"# (\w+\.py), (?:(\w+)\.)?(\w+)", line).groups()
            tree = ast.parse((ROOT / name).read_text())
            scope = next(n for n in tree.body if getattr(n, "name", "") == owner) if owner else tree
            node = next(n for n in ast.walk(scope) if getattr(n, "name", "") == function)
            lines = {bare(some) for some in lines_of(ROOT / name)[node.lineno - 1 : node.end_lineno]}
        else:
            assert bare(line) in lines, line


def test_promises_name_tests_that_exist():
    promised = set(re.findall(r"`(test_\w+)`", TEXTS[ROOT / "extras" / "promises.md"]))
    source = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    written = set(re.findall(r"^def (test_\w+)", source, re.M))
    assert promised <= written and len(promised) >= 15, promised - written


# --- commands ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program, config, presets, least",
    [
        ("pretrain.py", PretrainConfig, pretrain.PRESETS, 6),
        ("finetune.py", FinetuneConfig, finetune.PRESETS, 5),
    ],
)
def test_commands_of_the_trainings_are_settings(program, config, presets, least):
    lines = commands(program)
    assert len(lines) >= least
    assert all(name in README for name in presets)
    for words in lines:
        parse_config(config, presets, words)


def test_commands_of_the_scripts_parse(monkeypatch):
    """Each is accepted by its script's own command line; what it would do is not done here."""

    class Parsed(Exception):
        pass

    def stop(*_, **__):
        raise Parsed

    monkeypatch.setattr(evaluate, "init_distributed", stop)
    for module in (compare, listen):
        monkeypatch.setattr(module, "init_distributed", stop)
    monkeypatch.setattr(compare, "find_folds", lambda config: [1])
    monkeypatch.setattr(export, "export", stop)
    for name in ("plot_curves", "plot_masks", "plot_attention", "plot_timeline"):
        monkeypatch.setattr(plot, name, stop)
    monkeypatch.setattr(os.path, "isfile", lambda path: True)
    monkeypatch.setattr(os.path, "exists", lambda path: True)
    monkeypatch.setattr(os.path, "isdir", lambda path: path == "." or "." not in path)  # runs
    programs = {f"extras/{name}.py": module for name, module in SCRIPTS.items() if module is not prepare}
    programs["evaluate.py"] = evaluate
    counts = dict.fromkeys(programs, 0)
    for program, module in programs.items():
        for words in commands(program):
            monkeypatch.setattr(sys, "argv", [program, *words])
            with pytest.raises((Parsed, evaluate.CheckpointError)):
                module.main()
            counts[program] += 1
    assert min(counts.values()) >= 1 and counts["evaluate.py"] >= 3, counts


@pytest.mark.long
def test_commands_of_prepare_run(tmp_path, script):
    """On folders as the README has them."""
    os.symlink(ROOT / "extras" / "demo" / "prompts", tmp_path / "my_audio")
    (tmp_path / "sorted").mkdir()
    for part in ("train", "test"):
        os.symlink(ROOT / "extras" / "demo" / "words", tmp_path / "sorted" / part)
    lines = commands("extras/prepare.py")
    assert {words[0] for words in lines} == {"scan", "stats", "pack"}
    sets = {"esc50", "speechcommands", "audioset", "released"}  # in --help
    assert set(re.findall(r"prepare.py (\w+)", prepare.__doc__)) == {"scan", "stats", "pack"} | sets
    shard = tmp_path / "20k" / "train" / "0.tar"
    shard.parent.mkdir(parents=True)
    with tarfile.open(shard, "w") as tar:
        tar.add(ROOT / "extras" / "demo" / "words" / "stop" / "34.opus", "a.opus")
        (tmp_path / "a.json").write_text('{"label": ["Speech"]}')
        tar.add(tmp_path / "a.json", "a.json")
    order = ("scan", "stats", "pack")
    for words in sorted(lines, key=lambda words: order.index(words[0])):
        words = [str(shard) if "*" in word else word for word in words]
        script("extras/prepare.py", *words)
    assert (tmp_path / "packed.pcm").exists() and (tmp_path / "known.tsv").exists()
    assert (tmp_path / "train.tsv").read_text().endswith("\tSpeech\n")


def test_the_two_setup_commands():
    """Each is one line that makes the environment; .ci/run types the second."""
    setup = [block for block in blocks("bash") if "venv" in block]
    assert len(setup) == 2 and all(len(block.strip().splitlines()) == 1 for block in setup)
    assert "--preset demo" in setup[0] and setup[1].strip().endswith("-m pytest -q")
    assert "grep --max-count=1 -- '-m pytest -q' README.md" in (ROOT / ".ci" / "run").read_text()


def test_snippets_run(tmp_path, script, monkeypatch):
    """In order, in one session."""
    os.symlink(ROOT / "extras", tmp_path / "extras")
    (tmp_path / "worstchan").mkdir()
    for name, golden in (("pretrain", "pretrained"), ("finetune_AS2M", "finetuned")):
        folder = tmp_path / "worstchan" / f"EAT-base_epoch30_{name}"
        os.symlink(ROOT / "tests" / "golden" / f"hf_{golden}", folder)
    monkeypatch.chdir(tmp_path)
    session: dict = {}
    for snippet in blocks("python"):
        exec(snippet, session)
    assert session["probabilities"].shape == (1, len(session["model"].classes))
    patches, times = session["patches"], session["times"]
    assert patches.shape == (1, len(times), 8, session["encoder"].config.width)
    frames, depth = session["spec"].shape[2], session["encoder"].config.depth
    assert len(times) == frames // 16 and times[:2].tolist() == pytest.approx([0.08, 0.24])
    tokens = session["encoder"](session["spec"], n_blocks=max(1, depth * 7 // 12))
    assert torch.equal(tokens[:, 1:][0, -1], patches[0, -1, -1])


@pytest.mark.long
def test_the_output_on_the_first_screen(tmp_path, script):
    """Ten words taught in seconds, and the word in a recording."""
    commands = [line.split("#")[0].split() for line in blocks("bash")[1].splitlines()]
    os.symlink(ROOT / "extras", tmp_path / "extras")
    for _, *command in commands:
        said = script(*command).stdout
    assert said in README


@pytest.mark.long
def test_scripts_run_from_any_folder(tmp_path):
    """As `python extras/NAME.py`, and without a word of the folder they are started in."""
    paths = [ROOT / "extras" / f"{name}.py" for name in SCRIPTS]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    jobs = [subprocess.Popen([sys.executable, path, "--help"], cwd=tmp_path, **pipes) for path in paths]
    for path, job in zip(paths, jobs):
        said, errors = job.communicate()
        assert job.returncode == 0 and str(path.relative_to(ROOT)) in said, errors


# --- numbers -----------------------------------------------------------------------------------------------


def cells_of(text: str, row: str) -> list[str]:
    return re.search(rf"^\| {re.escape(row)} \| (.+) \|$", text, re.M).group(1).split(" | ")


def test_numbers_of_the_laptop_run():
    """Its tables are made of the runs' scores, and those of fine-tuning are the last in the runs' logs."""
    folder, last = RUNS / "laptop", {}
    found = json.loads((folder / "laptop.json").read_text())
    table = "\n".join(laptop.tables(found))
    for part in table.split("\n\n"):
        assert part in TEXTS[folder / "README.md"]
    for line in map(json.loads, lines_of(folder / "logs.jsonl")):
        if "accuracy" in line:
            last[line["run"]] = line["accuracy"]
    for task, rows in found["tasks"].items():
        for row, form in (
            (laptop.TUNED, f"{task}-%s/pretrained"), (laptop.SCRATCH, f"{task}-%s/scratch"),
            (laptop.LONGER[laptop.TUNED], f"longer-tuned-{task}-%s/pretrained"),
            (laptop.LONGER[laptop.SCRATCH], f"longer-scratch-{task}-%s/scratch"),
        ):  # fmt: skip
            scores = [last[form % seed] for seed in laptop.SEEDS if form % seed in last]
            assert rows[row] == scores
    for step, scores in found["tuned"].items():
        if int(step) in laptop.STEPS:
            runs = (f"curve{step}-{seed}/pretrained" for seed in laptop.SEEDS)
            assert scores == [last[run] for run in runs if run in last]
    assert found["wide"][laptop.TUNED] == [last[f"wide-{seed}/pretrained"] for seed in laptop.SEEDS]
    below = {
        task: f"{100 * (statistics.mean(found['curve'][task]['4000']) - found['wide'][task][0]):.0f}"
        for task in laptop.CURVE
    }
    assert (below["events"], below["words10"]) == (below["drums"], "0")
    said = f"frozen it is {below['words35']} points below on 35 words, {below['events']} on events and drums"
    assert f"{said}, equal on ten words" in " ".join(TEXTS[folder / "README.md"].split())
    means = {
        task: {row: statistics.mean(scores) for row, scores in rows.items() if scores}
        for task, rows in found["tasks"].items()
    }
    gain = {task: f"{100 * (rows[laptop.TUNED] - rows[laptop.SCRATCH]):.0f}" for task, rows in means.items()}
    assert gain["words10"] == gain["mandarin"]
    said = f"{gain['words10']} points on ten words and on the rhymes, {gain['words35']} on 35 words, "
    said += f"{gain['events']} on the events, {gain['drums']} on the drums"
    assert said in " ".join(TEXTS[folder / "README.md"].split())
    tuned, scratch = laptop.LONGER[laptop.TUNED], laptop.LONGER[laptop.SCRATCH]
    ahead = {t: f"{100 * (rows[tuned] - rows[scratch]):.0f}" for t, rows in means.items() if tuned in rows}
    assert ahead["words35"] == ahead["mandarin"]
    said = f"stays {ahead['words10']} points ahead on ten words, {ahead['words35']} on 35 words and rhymes"
    ahead = {t: f"{100 * (rows[laptop.TUNED] - rows[scratch]):.0f}" for t, rows in means.items()}
    text = " ".join(TEXTS[folder / "README.md"].split())
    assert said in text and f"still {ahead['events']} and {ahead['drums']} points ahead" in text
    said = "With 4 times the fine-tuning updates, 35 words reach {}, from scratch {}"
    cell = {task: {row: f"{mean:.2f}"[1:] for row, mean in rows.items()} for task, rows in means.items()}
    said = said.format(*(cell["words35"][row] for row in laptop.LONGER.values()))
    assert said in " ".join(README.split())


def test_numbers_of_the_encoder_that_comes_with_the_code():
    """What its log, the probes of its blocks and extras/runs/targets.py say."""
    folder, text = RUNS / "laptop", TEXTS[RUNS / "laptop" / "README.md"]
    everything = list(map(json.loads, lines_of(folder / "logs.jsonl")))
    log = [r for r in everything if r["run"] == "pretrain1"]
    frame = {r["step"]: r["loss_frame"] for r in log if "loss_frame" in r}
    scores = [f"{r['probe_linear']:.2f}"[1:] for r in log if "probe_linear" in r and r["step"] > 400]
    assert min(frame, key=frame.get) == 400 and max(frame) == 4000 == log[-1]["step"]
    for seed in laptop.SEEDS:
        runs = [r for r in everything if r["run"] == f"pretrain{seed}"]
        losses = [r["loss_frame"] for r in runs if "loss_frame" in r]
        probes = [r["probe_linear"] for r in runs if "probe_linear" in r]
        assert losses[0] > losses[-1] > 1.5 * min(losses) and probes[-1] > 1.5 * probes[0]
        later = [r["probe_linear"] for r in runs if "probe_linear" in r and r["step"] > 400]
        assert later[-1] > 1.2 * later[0]
    said = f"falls from {frame[1]:.1f} to {frame[400]:.1f} at update 400, then rises to {frame[4000]:.1f}"
    assert said in text and f"the probe rises from {scores[0]} to {scores[-1]}" in text
    for row, cells in json.loads((folder / "blocks.json").read_text()).items():
        pooling, of = row.split(", ")
        assert cells_of(text, f"`{pooling}`, {of}") == [f"{cell:.3f}"[1:] for cell in cells]
    for line in lines_of(folder / "targets.txt")[1:]:
        update, *cells = line.split()[-6:]
        cells = [cell.replace("0.", ".") for cell in cells]
        assert f"| {int(update):,} | {' | '.join(cells)} |" in text


def test_numbers_of_the_demo():
    """Of its tables, of what its README and the main one say beside them; all scores end a log."""
    folder = RUNS / "demo"
    text = TEXTS[folder / "README.md"]
    found = {path.stem: json.loads(path.read_text())["accuracy"] for path in folder.glob("*.json")}
    demo = found["demo"]
    shipped = found["shipped"]
    words = found["words35"]
    for row, scores in demo.items():
        others = shipped.get(row, []) if row.endswith(", pre-trained") else []
        assert cells_of(text, row) == [laptop.cell(scores), laptop.cell(others)]

    longer = found["scratch4"][laptop.SCRATCH]
    assert cells_of(text, f"{laptop.SCRATCH}, 4 times the updates") == [laptop.cell(longer), "-"]
    assert statistics.mean(longer) <= statistics.mean(demo[laptop.SCRATCH])

    logs = {}
    for record in map(json.loads, lines_of(folder / "logs.jsonl")):
        logs.setdefault(record["run"], []).append(record)
    ends = {run: [r["accuracy"] for r in log if "accuracy" in r][-1:] for run, log in logs.items()}
    for row, scores in found["heads"].items():
        words10, events = scores.values()
        assert cells_of(text, row) == [laptop.cell(words10), laptop.cell(events)]
        name = row.replace(",", "").replace(" ", "-")
        if row == "bands":
            assert words10 == shipped[laptop.TUNED]
        else:
            assert words10 == sum((ends[f"words/{name}/seed{s}/pretrained"] for s in (1, 2, 3)), [])
        assert events == sum((ends[f"events/{name}/seed{s}/pretrained"] for s in (1, 2, 3)), [])
    for name in ("demo", "shipped", "words35", "scratch4"):
        for row, kind in ((laptop.TUNED, "pretrained"), (laptop.SCRATCH, "scratch")):
            if row in found[name]:
                assert found[name][row] == sum((ends[f"{name}/seed{s}/{kind}"] for s in (1, 2, 3)), [])
    readme = " ".join(README.split())
    for seed in (1, 2, 3):
        probes = {r["step"]: r["probe_linear"] for r in logs[f"pretrain{seed}"] if "probe_linear" in r}
        assert list(probes) == [0, 240, 480]
        if seed == 1:
            assert f"rises from {probes[0]:.3f} to {probes[480]:.3f}".replace("0.", ".") in readme

    mean = {name: {row: statistics.mean(scores) for row, scores in table.items()} for name, table in (
        ("demo", demo), ("shipped", shipped), ("words35", words),
    )}  # fmt: skip
    pair = (mean["words35"][laptop.SCRATCH], mean["words35"][laptop.TUNED])
    assert "from {:.2f} to {:.2f} on 35 spoken words".format(*pair).replace("0.", ".") in readme
    pair = (mean["demo"][laptop.SCRATCH], mean["shipped"][laptop.TUNED])
    assert "from {:.2f} to {:.2f} on ten".format(*pair).replace("0.", ".") in readme
    worth = [100 * (mean[name][laptop.TUNED] - pair[0]) for name in ("demo", "shipped")]
    deviation = statistics.stdev(shipped[laptop.TUNED])
    assert f"on ten (± {deviation:.3f}). Four minutes add {worth[0]:.0f} points".replace("0.", ".") in readme
    text = " ".join(text.split())
    assert f"pre-training are worth {worth[0]:.0f} points" in text
    assert f"the longer run is worth {worth[1]:.0f}" in text


def test_numbers_of_the_ablations():
    """Their table is made of the runs' scores; each run has its log, and those of fine-tuning end in them."""
    folder, last = RUNS / "ablations", {}
    found = json.loads((folder / "ablations.json").read_text())
    assert "\n".join(ablations.tables(found)) in TEXTS[folder / "README.md"]
    for line in map(json.loads, lines_of(folder / "logs.jsonl")):
        last.setdefault(line["run"], {}).update(line)
    for axis in ablations.AXES.values():
        for name in axis:
            trained = [last[run] for seed in ablations.SEEDS if (run := f"{name}-{seed}") in last]
            assert all(len(scores) == len(trained) > 0 for scores in found["probes"][name].values())
            assert all(log["step"] == ablations.BASE["updates"] for log in trained)
    for name, poolings in found["tuned"].items():
        for pooling, scores in poolings.items():
            runs = (f"{name}-{seed}-{pooling}/pretrained" for seed in ablations.SEEDS)
            assert scores == [last[run]["accuracy"] for run in runs if run in last] != []
    text = " ".join(TEXTS[folder / "README.md"].split())
    cls = {name: statistics.mean(scores["cls"]) for name, scores in found["tuned"].items()}
    gains = (f"{100 * (cls[name] - cls['weight0']):.1f}" for name in ("base", "weight1.92"))
    assert f"{' and '.join(gains)} points ahead of none" in text
    words = {name: statistics.mean(scores["words35"]) for name, scores in found["probes"].items()}
    mean = {name: statistics.mean(scores["mean"]) for name, scores in found["tuned"].items()}
    behind = cls["slow1"] - cls["slow192"], mean["slow1"] - mean["slow192"]
    assert f"by {100 * (words['slow192'] - words['slow1']):.1f} points on 35 words" in text
    assert "Fine-tuned it is {:.0f} and {:.0f} points behind".format(*(100 * x for x in behind)) in text
    assert f"the mean patch is {100 * (mean['slow1'] - cls['slow1']):.0f} points ahead for weight 1" in text
    clones = f"{100 * (words['clones1'] - words['base']):.0f}"
    assert f"are {clones} points better on 35 words than 4 clips" in text
    others = [words[name] for name in ("random", "blocks3", "flexible")]
    assert 0.035 <= min(others) - words["base"] + 5e-4 and max(others) - words["base"] <= 0.05 + 5e-4
    worth = max(words[name] for axis in ablations.AXES.values() for name in axis) - words["random encoder"]
    assert f"are worth {100 * worth:.0f} points at most on 35 words" in text
    log = [r for r in map(json.loads, lines_of(folder / "logs.jsonl")) if r["run"] == "weight192-1"]
    shares = [round(r["loss_utterance"] / r["loss_frame"]) for r in log if "loss_frame" in r]
    assert f"{min(shares)} to {max(shares)} times the frame loss" in text


def test_numbers_of_the_bench():
    text = TEXTS[RUNS / "speed" / "README.md"]
    found = json.loads((RUNS / "speed" / "cpu.json").read_text())
    for key, form in (
        ("update (s)", "{:.2f} s"), ("update (GFLOP/s)", "{:.0f} GFLOP/s"),
        ("update / matrix product", "{:.2f} "), ("peak memory (GiB)", "{:.2f} GiB"),
        ("decoding flac alone, one thread (clips/s)", "{:.0f} clips/s"),
        ("loader, flac files, 1 workers (clips/s)", "{:.0f} clips/s"),
        ("loader, packed, 1 workers (clips/s)", "{:.0f} clips/s"),
        ("2,000,000 lines: opening (s)", "{:.1f} s"),
    ):  # fmt: skip
        assert f"| {form.format(found[key])}" in text, key
    before = json.loads((RUNS / "speed" / "before.json").read_text())
    said = "an update {:.2f} s, peak memory {:.2f} GiB, loader {:.0f} clips/s from flac files "
    said += "and {:.0f} packed, with 2,000,000 lines {:.0f}, start to first update {:.0f} s"
    keys = ["update (s)", "peak memory (GiB)", "loader, flac files, 1 workers (clips/s)"]
    keys += ["loader, packed, 1 workers (clips/s)", "2,000,000 lines: loader (clips/s)"]
    keys.append("2,000,000 lines: start of pretrain.py to its first update (s)")
    assert said.format(*(before[key] for key in keys)) in " ".join(text.split())
    said = "takes {:.0f} s and {:.1f} GiB on one AVX2 core, at {:.0f} % of the rate of a plain matrix product"
    share = 100 * found["update / matrix product"]
    said = said.format(found["update (s)"], found["peak memory (GiB)"], share)
    assert said in " ".join(README.split())
    first = found["DDP: the first part starts after this share of the backward"]
    last = found["DDP: the last part starts after this share of the backward"]
    assert f"starts after {first:.0%}".replace("%", " %") in text
    assert f"the last after {last:.0%}"[:-1] in text
    per_update = found["DDP: gradients averaged in an update (MB)"]
    assert all(f"{2 * (n - 1) / n * per_update:.0f} MB with {n}" in text for n in (4, 64))


def test_the_arithmetic_of_an_update():
    text = TEXTS[RUNS / "speed" / "README.md"]
    flops = update_flops(PretrainConfig(batch_size=12), MODELS["base"])
    for part, count in flops.items():
        assert re.search(rf"^{part} .* {count / 1e12:.2f} TFLOP$", text, re.M), part
    total = sum(flops.values())
    assert f"{total / 1e12:.2f} TFLOP" in text and f"{total * 4 * 400_000:.2e}".replace("e+", "e") in text
    for card, peak in (("RTX 3090", 71), ("A100", 312), ("H200", 989)):
        hours = [total * 400_000 / (share * peak * 1e12) / 3600 for share in (0.35, 0.5)]
        cells = [f"{h:.1f}" if h < 10 else f"{h:.0f}" for h in hours]
        assert f"| {card} | {peak} TFLOP/s | {cells[0]} h | {cells[1]} h |" in text
