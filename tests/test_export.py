"""What is exported gives the same numbers where it is loaded: with transformers, as ONNX, by torch.export."""

import dataclasses
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, tone

from data import SAMPLE_RATE, AudioDataset, clip_samples, spectrogram
from evaluate import predict, save_checkpoint
from extras import graphs, listen, released
from extras.export import export
from model import EAT, MODELS, POOLINGS, AudioClassifier, CheckpointError, Encoder, read_pretrained

NEEDS_TRANSFORMERS = pytest.mark.skipif(not find_spec("transformers"), reason="needs transformers")
NEEDS_ONNX = pytest.mark.skipif(not all(map(find_spec, graphs.PACKAGES)), reason="needs onnx and onnxruntime")
CONFIG = dataclasses.replace(MODELS["tiny"], clip_frames=64, norm_mean=-5.0, norm_std=3.0)
CLASSES = {f"c{i}": f"Name {11 - i}" for i in range(12)}  # "10" sorts before "2", and names before labels


def save_encoder(path: Path) -> Path:
    """An untrained encoder, as a pre-training run saves it."""
    torch.manual_seed(0)
    parts = dict(student=EAT(CONFIG).state_dict(), teacher=Encoder(CONFIG).state_dict())
    save_checkpoint(path, step=1, network=dataclasses.asdict(CONFIG), **parts)
    return path


def save_classifier(path: Path, pooling: str, norm_eps: float | None, block: int) -> Path:
    """An untrained classifier of twelve classes, as a fine-tuning run saves it."""
    torch.manual_seed(0)
    model = AudioClassifier(CONFIG, CLASSES, pooling, True, norm_eps, block)
    torch.nn.init.normal_(model.head.weight, std=0.1)
    weights = model.state_dict()
    for name in ("fc_norm.weight", "fc_norm.bias"):
        if name in weights:
            torch.nn.init.normal_(weights[name])
    network = dataclasses.asdict(CONFIG)
    save_checkpoint(path, step=1, network=network, head=model.head_settings, classifier=weights)
    return path


def random_spec(n_clips: int, n_frames: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n_frames)
    return torch.randn(n_clips, 1, n_frames, 128, generator=generator)


def run_python(code: str, *args, folder: Path, **environment) -> str:
    """What a new process prints, which finds this project only if it looks for it."""
    environment = os.environ | environment
    command = [sys.executable, "-c", code, *map(str, args)]
    result = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


# --- loaded by others' code -------------------------------------------------------------------------------


def test_an_encoder_built_without_memory_and_filled(tmp_path):
    """As transformers 5 does: on "meta", with empty memory, from a file. Nothing computed is missing."""
    encoder = Encoder.from_pretrained(save_encoder(tmp_path / "encoder.pt"))
    with torch.device("meta"):
        empty = Encoder(CONFIG)
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(encoder.state_dict())
    spec = random_spec(2, 64)
    with torch.no_grad():
        assert torch.equal(filled.eval()(spec), encoder(spec))


LOAD_WITH_TRANSFORMERS = """
import sys
import numpy, torch
from transformers import AutoModel, AutoModelForAudioClassification
assert not any(name in sys.modules for name in ("model", "data", "extras", "timm"))
spec = torch.from_numpy(numpy.load("spec.npy"))
waveform = torch.from_numpy(numpy.load("waveform.npy"))
for name in sys.argv[1:]:
    model = AutoModel.from_pretrained(name, trust_remote_code=True).eval()
    with torch.no_grad():
        numpy.save(f"{name}/output.npy", model(spec)[0])
        numpy.save(f"{name}/tokens.npy", model.extract_features(spec))
        numpy.save(f"{name}/spec.npy", model.spectrogram(waveform))
    model.save_pretrained(f"{name}/again")
    if model.config.head:
        assert list(model.config.id2label.items()) == [(i, f"Name {11 - i}") for i in range(12)]
        tagger = AutoModelForAudioClassification.from_pretrained(name, trust_remote_code=True).eval()
        with torch.no_grad():
            assert torch.equal(tagger(spec).logits, model(spec).logits)
"""


HEADS = list(itertools.product(POOLINGS, (None, 1e-6, 1e-5), (0, 1)))


@NEEDS_TRANSFORMERS
@pytest.mark.long
def test_transformers_computes_what_the_checkpoint_does(tmp_path):
    """An encoder and classifiers of every pooling, norm and block, in a process that does not find this
    project: the same bits; saved anew by transformers, the same weights and settings once more."""
    checkpoints = {"encoder": save_encoder(tmp_path / "encoder.pt")}
    for pooling, norm_eps, block in HEADS:
        name = f"{pooling}-{norm_eps}-{block}"
        checkpoints[name] = save_classifier(tmp_path / f"{name}.pt", pooling, norm_eps, block)
    for name, path in checkpoints.items():
        export(path, tmp_path / name)
    spec = random_spec(2, 70)
    waveform = torch.stack([tone(8000), tone(8000, hz=1000)])
    np.save(tmp_path / "spec.npy", spec)
    np.save(tmp_path / "waveform.npy", waveform)
    offline = dict(HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    run_python(LOAD_WITH_TRANSFORMERS, *checkpoints, folder=tmp_path, **offline)

    padded = torch.nn.functional.pad(waveform, (0, clip_samples(64) - 8000))
    expected = spectrogram(padded, torch.tensor([8000, 8000]), -5.0, 3.0)
    for name, path in checkpoints.items():
        model = Encoder.from_pretrained(path)
        encoder = model
        if name != "encoder":
            model = AudioClassifier.from_pretrained(path)
            encoder = model.encoder
        with torch.no_grad():
            assert np.array_equal(np.load(tmp_path / name / "output.npy"), model(spec)), name
            assert np.array_equal(np.load(tmp_path / name / "tokens.npy"), encoder(spec)), name
        assert np.array_equal(np.load(tmp_path / name / "spec.npy"), expected), name
        again = read_pretrained(tmp_path / name / "again")
        first = read_pretrained(tmp_path / name)
        assert again["network"] == first["network"]
        assert again.get("head") == first.get("head")
        if "head" in first:
            assert list(again["head"]["classes"].items()) == list(CLASSES.items())
        part = "classifier" if "head" in first else "student"
        assert all(torch.equal(again[part][key], value) for key, value in first[part].items())


WRAP = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from transformers import PretrainedConfig, PreTrainedModel
from model import Encoder

class Config(PretrainedConfig):
    model_type = "wrapped"

class Wrapped(PreTrainedModel):
    config_class = Config
    def __init__(self, config):
        super().__init__(config)
        self.encoder = Encoder(encoder.config)
        self.post_init()

encoder = Encoder.from_pretrained("encoder.pt")
wrapped = Wrapped(Config())
wrapped.encoder.load_state_dict(encoder.state_dict())
wrapped.save_pretrained("wrapped")
spec = torch.randn(2, 1, 64, 128)
with torch.no_grad():
    print(torch.equal(Wrapped.from_pretrained("wrapped").encoder(spec), encoder(spec)))
"""


@NEEDS_TRANSFORMERS
@pytest.mark.long
def test_an_encoder_in_a_model_of_transformers(tmp_path):
    """Someone else's class around our Encoder, saved and loaded."""
    save_encoder(tmp_path / "encoder.pt")
    said = run_python(WRAP, ROOT, folder=tmp_path, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert said.endswith("True\n")


@NEEDS_TRANSFORMERS
@pytest.mark.long
@pytest.mark.parametrize("kind", ["encoder", "classifier"])
def test_the_code_of_the_model_card_works(tmp_path, kind):
    """As it stands there, on a file."""
    if kind == "encoder":
        path = save_encoder(tmp_path / "x.pt")
    else:
        path = save_classifier(tmp_path / "x.pt", "bands", None, 1)
    export(path, tmp_path / "mine")
    soundfile.write(tmp_path / "clip.wav", tone(16_000).numpy(), 16_000, subtype="FLOAT")
    card = (tmp_path / "mine" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    if kind == "encoder":
        code += "print(tuple(tokens.shape))\n"
    said = run_python(code, folder=tmp_path, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1").splitlines()[-1]
    if kind == "encoder":
        assert said == "(1, 49, 64)"  # 98 frames: 6 rows of 8 patches
        return
    model = AudioClassifier.from_pretrained(path)
    with torch.no_grad():
        scores = model(spectrogram(tone(16_000)[None], torch.tensor([16_000]), -5.0, 3.0))[0]
    assert said == list(CLASSES.values())[int(scores.argmax())]


def test_the_front_end_of_an_exported_folder(tmp_path):
    """It needs torch only, and gives the bits of data.py."""
    export(save_encoder(tmp_path / "x.pt"), tmp_path / "out")
    spec = importlib.util.spec_from_file_location("front_end", tmp_path / "out" / "front_end.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    waveform = tone(20_000)[None]
    n_samples = torch.tensor([15_000])
    ours = spectrogram(waveform, n_samples, -4.0, 3.0)
    assert torch.equal(module.spectrogram(waveform, n_samples, -4.0, 3.0), ours)
    text = (tmp_path / "out" / "front_end.py").read_text()
    imports = [line for line in text.splitlines() if line.startswith(("import", "from"))]
    assert imports == ["import functools", "import math", "import torch", "from torch import Tensor"]


@pytest.mark.parametrize(
    "pooling, norm_eps, block, reason",
    [
        ("mean", 1e-5, 0, "it pools mean, that code knows cls"),
        ("bands", 1e-5, 0, "it pools bands, that code knows cls"),
        ("cls", None, 0, "it has no norm before its head, that code has one"),
        ("cls", 1e-6, 0, "the norm before its head has eps 1e-06, in that code 1e-05"),
        ("cls", 1e-5, 1, "its head sees block 1, in that code the last"),
    ],
)
def test_the_published_layout_is_refused_where_it_is_not_exact(tmp_path, pooling, norm_eps, block, reason):
    path = save_classifier(tmp_path / "x.pt", pooling, norm_eps, block)
    with pytest.raises(CheckpointError) as error:
        export(path, tmp_path / "out", published=True)
    assert str(error.value) == f"{path} would not be exact with the published code: {reason}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "pooling, norm_eps, block, is_exact",
    [
        ("cls", 1e-6, 0, True), ("mean", 1e-6, 2, True), ("bands", 1e-6, 0, False), ("cls", None, 0, False),
        ("cls", 1e-5, 0, False), ("mean", 1e-6, 1, False),
    ],
)  # fmt: skip
def test_fairseq_is_left_out_where_it_is_not_exact(tmp_path, called, pooling, norm_eps, block, is_exact):
    """And comes back as it was where it is written."""
    path = save_classifier(tmp_path / "x.pt", pooling, norm_eps, block)
    result = called(released, path, "out")
    assert (tmp_path / "out" / "fairseq.pt").exists() == is_exact
    assert ("fairseq.pt" in result.stdout) == is_exact
    assert ("no fairseq.pt, it would not be exact with the released code: " in result.stderr) != is_exact
    if is_exact:
        spec = random_spec(2, 64)
        with torch.no_grad():
            ours = AudioClassifier.from_pretrained(path)(spec)
            assert torch.equal(AudioClassifier.from_pretrained(tmp_path / "out" / "fairseq.pt")(spec), ours)


# --- torch.export and torch.jit.trace ---------------------------------------------------------------------


def test_the_encoder_is_exported_with_any_batch_and_length(tmp_path):
    encoder = Encoder.from_pretrained(save_encoder(tmp_path / "x.pt"))
    shapes = ({0: torch.export.Dim("batch"), 2: 16 * torch.export.Dim("rows", min=2, max=768)},)
    with torch.no_grad():
        program = torch.export.export(encoder, (random_spec(2, 64),), dynamic_shapes=shapes)
        for n_clips, n_frames in ((1, 32), (3, 64), (2, 320)):
            spec = random_spec(n_clips, n_frames)
            torch.testing.assert_close(program.module()(spec), encoder(spec), rtol=0, atol=2e-6)


def test_the_encoder_is_traced_with_any_batch_and_length(tmp_path):
    encoder = Encoder.from_pretrained(save_encoder(tmp_path / "x.pt"))
    with torch.no_grad():
        traced = torch.jit.trace(encoder, random_spec(2, 64))
        for n_clips, n_frames in ((1, 16), (3, 64), (2, 330)):
            spec = random_spec(n_clips, n_frames)
            torch.testing.assert_close(traced(spec), encoder(spec), rtol=0, atol=2e-6)


class Tokens(torch.nn.Module):
    """Waveforms (B, S) to tokens."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        n_samples = torch.full((waveform.shape[0],), waveform.shape[1])
        return self.encoder(spectrogram(waveform, n_samples, -5.0, 3.0))


@pytest.mark.long
def test_waveform_to_tokens_is_exported(tmp_path):
    model = Tokens(Encoder.from_pretrained(save_encoder(tmp_path / "x.pt")))
    shapes = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    with torch.no_grad():
        model(torch.zeros(1, 16_000))
        program = torch.export.export(model, (torch.randn(2, 16_000),), dynamic_shapes=shapes)
        traced = torch.jit.trace(model, torch.randn(2, 16_000))
        for n_clips, n_samples in ((1, 6_000), (3, 16_000), (2, 50_001)):
            waveform = graphs.noise(n_clips, n_samples)
            expected = model(waveform)
            torch.testing.assert_close(program.module()(waveform), expected, rtol=0, atol=2e-6)
            torch.testing.assert_close(traced(waveform), expected, rtol=0, atol=2e-6)


@pytest.mark.long
def test_an_export_first_of_all_leaves_the_front_end_alone(tmp_path):
    """A process that exports before it has made a spectrogram makes right ones afterwards."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from data import log_mel

class FrontEnd(torch.nn.Module):
    def forward(self, waveform):
        return log_mel(waveform)

torch.export.export(FrontEnd(), (torch.zeros(1, 4000),))
print(type(log_mel(torch.ones(1, 4000))).__name__)
"""
    assert run_python(code, folder=tmp_path) == "Tensor\n"


# --- ONNX -------------------------------------------------------------------------------------------------

RUN_ONNX = """
import json, sys
import numpy, onnxruntime
session = onnxruntime.InferenceSession("out/model.onnx")
inputs = numpy.load("inputs.npz")
outputs = {}
for name in inputs.files:
    for output, value in zip(session.get_outputs(), session.run(None, {"waveform": inputs[name]})):
        outputs[f"{name} {output.name}"] = value
numpy.savez("outputs.npz", **outputs)
for n_samples in (399, 1_968_880, 2_500_000):
    try:
        session.run(None, {"waveform": numpy.zeros((1, n_samples), numpy.float32)})
        print(n_samples, "was taken")
    except Exception as error:
        assert "out of data bounds" in str(error), error
assert not any(name in sys.modules for name in ("torch", "model", "data", "extras"))
print(json.dumps(session.get_modelmeta().custom_metadata_map))
"""


def run_onnx(folder: Path, waveforms: dict[str, torch.Tensor]) -> tuple[dict, dict]:
    """Outputs and metadata of out/model.onnx, in a process that imports neither torch nor this project."""
    np.savez(folder / "inputs.npz", **{name: value.numpy() for name, value in waveforms.items()})
    said = run_python(RUN_ONNX, folder=folder)
    return dict(np.load(folder / "outputs.npz")), json.loads(said)


@NEEDS_ONNX
@pytest.mark.long
def test_a_classifier_as_one_file_gives_the_scores_of_evaluate(tmp_path, called):
    """Of clips from one frame to the clip's length, padded as in evaluate.py; longer ones at once, up to two
    minutes; others are refused. The file says what its classes are."""
    path = save_classifier(tmp_path / "x.pt", "bands", None, 1)
    said = called(released, path, "out", "--onnx").stdout
    assert "model.onnx" in said
    model = AudioClassifier.from_pretrained(path)
    lengths = [400, 3000, 8001, clip_samples(64)]
    lines = [str(tmp_path)]
    waveforms = {}
    for n_samples in lengths:
        soundfile.write(tmp_path / f"{n_samples}.wav", tone(n_samples).numpy(), SAMPLE_RATE, subtype="FLOAT")
        lines.append(f"{n_samples}.wav\t{n_samples}")
        waveforms[str(n_samples)] = tone(n_samples)[None]
    (tmp_path / "m.tsv").write_text("\n".join(lines) + "\n")
    waveforms["batch"] = torch.stack([tone(8001), tone(8001, hz=1000), tone(8001, hz=50)])
    waveforms["long"] = tone(70_000)[None]
    waveforms["longest"] = torch.zeros(1, 1_968_879)
    found, about = run_onnx(tmp_path, waveforms)

    data = AudioDataset(tmp_path / "m.tsv", 64)
    scores = predict(lambda spec: model.probabilities(model(spec)), data, model.config, torch.device("cpu"))
    for n_samples, row in zip(lengths, scores.values):
        assert np.abs(found[f"{n_samples} probabilities"][0] - row.numpy()).max() < 1e-5
    assert found["batch probabilities"].shape == (3, 12)
    assert np.allclose(found["batch probabilities"][0], scores.values[2], atol=1e-5)
    assert not np.allclose(found["batch probabilities"][1], scores.values[2], atol=1e-3)
    with torch.no_grad():
        whole = model.probabilities(model(spectrogram(tone(70_000)[None], torch.tensor([70_000]), -5.0, 3.0)))
    assert np.allclose(found["long probabilities"], whole, atol=1e-5)
    assert found["longest probabilities"].sum() == pytest.approx(1, abs=1e-5)
    assert json.loads(about["classes"]) == list(CLASSES.values())
    assert json.loads(about["labels"]) == list(CLASSES)
    assert json.loads(about["exclusive"]) is True
    assert (about["sample_rate"], about["norm_mean"], about["norm_std"]) == ("16000", "-5.0", "3.0")


@NEEDS_ONNX
@pytest.mark.long
@pytest.mark.parametrize("kind", ["encoder", "classifier"])
def test_the_code_of_the_model_card_runs_model_onnx(tmp_path, called, kind):
    """As it stands there, beside the file; of a classifier it says of a long file what listen.py says."""
    if kind == "encoder":
        path = save_encoder(tmp_path / "x.pt")
    else:
        path = save_classifier(tmp_path / "x.pt", "bands", None, 1)
    called(released, path, "out", "--onnx")
    sound = torch.cat([tone(10_000, hz=100 * i) for i in range(1, 5)])
    soundfile.write(tmp_path / "out" / "clip.wav", sound.numpy(), SAMPLE_RATE, subtype="FLOAT")
    card = (tmp_path / "out" / "README.md").read_text().split("## model.onnx")[1]
    assert "Clips in training had 10,480 samples" in card
    code = card.split("```python\n")[1].split("```")[0]
    said = run_python(f"{code}import sys\nassert 'torch' not in sys.modules\n", folder=tmp_path / "out")
    if kind == "encoder":
        assert said.startswith("(1, 121, 64) [0.08 ")  # 248 frames: 15 rows
        return
    record = json.loads(called(listen, path, "out/clip.wav", "--json").stdout)
    assert len(record["windows"]) == 4
    for line, window in zip(said.splitlines(), record["windows"], strict=True):
        name, p = next(iter(window["top"].items()))
        begin, _, *words = line.split()
        assert float(begin) == pytest.approx(window["start"], abs=0.006)
        assert " ".join(words[:-1]) == name
        assert float(words[-1]) == pytest.approx(p, abs=6e-4)


@NEEDS_ONNX
@pytest.mark.long
def test_an_encoder_as_one_file_gives_tokens_and_their_times(tmp_path, called):
    path = save_encoder(tmp_path / "x.pt")
    called(released, path, "out", "--onnx", "--pt2")
    encoder = Encoder.from_pretrained(path)
    lengths = {400: 1, 5000: 1, 5360: 2, clip_samples(64): 4, 70_000: 27}  # and rows of patches in the clip
    found, about = run_onnx(tmp_path, {str(n): tone(n)[None] for n in lengths})
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    for n_samples, rows in lengths.items():
        tokens = found[f"{n_samples} tokens"]
        assert tokens.shape == (1, 1 + 8 * rows, 64)
        padded = torch.zeros(1, max(n_samples, clip_samples(64)))
        padded[0, :n_samples] = tone(n_samples)
        with torch.no_grad():
            expected = encoder(spectrogram(padded, torch.tensor([n_samples]), -5.0, 3.0))[:, : 1 + 8 * rows]
            loaded, _ = program(tone(n_samples)[None])
        assert np.abs(tokens - expected.numpy()).max() < 1e-4
        torch.testing.assert_close(loaded, expected, rtol=0, atol=2e-5)
        assert np.allclose(found[f"{n_samples} times"], 0.16 * (np.arange(rows) + 0.5))
    assert "classes" not in about


@NEEDS_ONNX
@pytest.mark.long
def test_a_file_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    path = save_classifier(tmp_path / "x.pt", "cls", 1e-6, 0)
    monkeypatch.setattr(graphs, "TOLERANCE", -1.0)
    with pytest.raises(CheckpointError, match="onnxruntime and the model differ by .*: no model.onnx"):
        graphs.write(str(path), tmp_path, onnx=True, pt2=False)
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize("name", ["safetensors", *graphs.PACKAGES])
def test_a_missing_package_is_one_line_and_nothing_is_written(tmp_path, called, monkeypatch, name):
    monkeypatch.setattr(graphs, "find_spec", lambda package: None if package == name else True)
    result = called(released, save_encoder(tmp_path / "x.pt"), "out", "--onnx", check=False)
    need = "this needs safetensors, onnx, onnxscript, onnxruntime"
    assert result.stderr == f"released.py: {need}: pip install {name}\n"
    assert not (tmp_path / "out").exists()
