"""Checkpoints of this project and of the released code: read alike, written alike, and never trusted.

EAT_GOLDEN chooses another recording, as in test_parity.py; the sizes come from its files.
"""

import argparse
import dataclasses
import enum
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file
from test_parity import GOLDEN, assert_near

from evaluate import newest_checkpoint, save_checkpoint
from extras.export import export
from model import (
    EAT, MODELS, NORM_EPS, POOLINGS, AudioClassifier, CheckpointError, Encoder, ModelConfig, load_checkpoint,
    read_pretrained, sincos_2d,
)  # fmt: skip
from pretrain import PretrainConfig, open_networks

PRETRAINED = ["fairseq_pretrained.pt", "hf_pretrained"]
FINETUNED = ["fairseq_finetuned.pt", "hf_finetuned"]


@pytest.fixture(scope="module")
def golden() -> dict:
    with np.load(GOLDEN / "finetune.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    spec = torch.from_numpy(arrays["spec"]).float()
    return arrays | dict(config=json.loads(str(arrays["config"])), spec=spec)


def weights_of(path) -> dict[str, torch.Tensor]:
    """Tensors of a released file by their own names."""
    if Path(path).is_dir():
        from safetensors.torch import load_file

        return load_file(Path(path) / "model.safetensors")
    weights = torch.load(path, weights_only=True)["model"]
    return {k: v for k, v in weights.items() if k != "_ema"}


# --- released files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FINETUNED)
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_logits_of_a_released_classifier(golden, name, pooling):
    model = AudioClassifier.from_pretrained(GOLDEN / name)
    if name.startswith("hf"):  # its norm has another eps, the recording is fairseq's
        assert model.fc_norm.eps == 1e-5
        model.fc_norm.eps = 1e-6
    model.pooling = pooling
    expected = golden["logits" if pooling == "cls" else "logits_mean_pooling"]
    with torch.no_grad():
        assert_near(f"{name}, {pooling}", model(golden["spec"]), expected, 1e-5)


def test_what_travels_with_a_released_classifier(golden):
    model = AudioClassifier.from_pretrained(GOLDEN / "fairseq_finetuned.pt")
    assert list(model.classes) == [f"class{i}" for i in range(golden["config"]["classes"])]
    assert model.config.clip_frames == golden["config"]["frames"]
    assert (model.config.norm_mean, model.config.norm_std) == (-4.268, 4.569)  # AudioSet's
    assert not model.exclusive and not model.training


@pytest.mark.parametrize("name", PRETRAINED)
def test_features_of_a_released_encoder(name):
    """After the five updates of pretrain.npz; its weights are known by name there."""
    with np.load(GOLDEN / "pretrain.npz", allow_pickle=False) as file:
        after = "steps/student/"
        student = {k.removeprefix(after): file[k] for k in file.files if k.startswith(after)}
        spec = torch.from_numpy(file["spec"]).float()
    encoder = Encoder.from_pretrained(GOLDEN / name)
    theirs = student["modality_encoders.IMAGE.extra_tokens"]
    assert torch.equal(encoder.cls_token, torch.from_numpy(theirs))
    assert torch.equal(encoder.blocks[1].mlp.fc2.weight, torch.from_numpy(student["blocks.1.mlp.fc2.weight"]))
    other = Encoder.from_pretrained(GOLDEN / "fairseq_finetuned.pt")  # fine-tuned for 0 steps
    with torch.no_grad():
        assert torch.equal(encoder(spec), other(spec))


def test_student_teacher_and_decoder_of_a_released_file(golden):
    student, teacher = EAT.from_pretrained(GOLDEN / "fairseq_pretrained.pt")
    state = torch.load(GOLDEN / "fairseq_pretrained.pt", weights_only=True)["model"]
    P = "modality_encoders.IMAGE."
    assert torch.equal(student.decoder.blocks[1].weight, state[P + "decoder.blocks.1.0.weight"])
    assert torch.equal(teacher.norm_pre.bias, state["_ema"][P + "context_encoder.norm.bias"])
    assert not torch.equal(teacher.norm_pre.bias, student.encoder.norm_pre.bias)
    assert torch.equal(
        Encoder.from_pretrained(GOLDEN / "fairseq_pretrained.pt", teacher=True).cls_token, teacher.cls_token
    )
    assert student.config.decoder_depth == golden["config"]["decoder_depth"]
    with pytest.raises(CheckpointError, match="no teacher"):
        Encoder.from_pretrained(GOLDEN / "hf_pretrained", teacher=True)
    with pytest.raises(CheckpointError, match="no teacher"):
        EAT.from_pretrained(GOLDEN / "fairseq_finetuned.pt")
    with pytest.raises(CheckpointError, match="no classifier"):
        AudioClassifier.from_pretrained(GOLDEN / "fairseq_pretrained.pt")


def test_a_released_file_without_teacher(tmp_path):
    """Where the EMA was dropped to save space, the encoder is read all the same."""
    state = torch.load(GOLDEN / "fairseq_pretrained.pt", weights_only=True)
    del state["model"]["_ema"]
    torch.save(state, tmp_path / "small.pt")
    exact = Encoder.from_pretrained(GOLDEN / "fairseq_pretrained.pt")
    assert torch.equal(Encoder.from_pretrained(tmp_path / "small.pt").cls_token, exact.cls_token)
    with pytest.raises(CheckpointError, match="no teacher"):
        Encoder.from_pretrained(tmp_path / "small.pt", teacher=True)
    with pytest.raises(CheckpointError, match="no teacher"):
        EAT.from_pretrained(tmp_path / "small.pt")


def test_half_precision_and_all_768_rows_of_positions(tmp_path):
    """As the published files have them; the weights become fp32."""
    state = torch.load(GOLDEN / "fairseq_pretrained.pt", weights_only=True)
    positions = "modality_encoders.IMAGE.fixed_positional_encoder.positions"
    width = state["model"][positions].shape[2]
    for model in (state["model"], state["model"]["_ema"]):
        model[positions] = sincos_2d(768, 8, width)[None]
    state["model"] = {k: v.half() if k != "_ema" else v for k, v in state["model"].items()}
    torch.save(state, tmp_path / "half.pt")
    encoder = Encoder.from_pretrained(tmp_path / "half.pt")
    exact = Encoder.from_pretrained(GOLDEN / "fairseq_pretrained.pt")
    assert encoder.cls_token.dtype == torch.float32
    torch.testing.assert_close(encoder.cls_token, exact.cls_token, rtol=1e-3, atol=1e-3)
    state["model"][positions] = torch.randn(1, 512, width)
    torch.save(state, tmp_path / "learned.pt")
    with pytest.raises(CheckpointError, match="positions are not the fixed"):
        Encoder.from_pretrained(tmp_path / "learned.pt")


# --- export -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRETRAINED + FINETUNED)
def test_export_has_the_published_keys_shapes_and_fields(tmp_path, name):
    is_tuned = name in FINETUNED
    source = GOLDEN / name
    if name == "fairseq_finetuned.pt":  # its norm has fairseq's eps: give it the published one
        state = read_pretrained(source)
        del state["path"]
        state["head"]["norm_eps"] = 1e-5
        source = tmp_path / "x.pt"
        torch.save(state, source)
    export(source, tmp_path / "out", published=True)
    theirs = GOLDEN / ("hf_finetuned" if is_tuned else "hf_pretrained")
    ours = weights_of(tmp_path / "out")
    published = weights_of(theirs)
    assert ours.keys() == published.keys()
    for key, value in published.items():
        if key.endswith("positions"):  # the recording has 512 rows, the published models have 768 x 8
            assert ours[key].shape == (1, 6144, value.shape[2])
            torch.testing.assert_close(ours[key][:, : value.shape[1]], value, rtol=0, atol=1e-6)
        else:
            assert torch.equal(ours[key], value), key
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = json.loads((theirs / "config.json").read_text())
    assert [key for key in config if key not in ("eat", "auto_map", "id2label")] == list(expected)
    different = {key for key in expected if config[key] != expected[key]}
    assert different <= {"max_length"} | (set() if is_tuned else {"num_classes"})


@pytest.mark.parametrize("name", ["fairseq_pretrained.pt", "fairseq_finetuned.pt"])
def test_export_of_the_released_layout(tmp_path, name):
    export(GOLDEN / name, tmp_path / "out")
    ours = weights_of(tmp_path / "out" / "fairseq.pt")
    theirs = weights_of(GOLDEN / name)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours if not k.endswith("positions"))
    state = torch.load(tmp_path / "out" / "fairseq.pt", weights_only=True)
    released = torch.load(GOLDEN / name, weights_only=True)
    assert released.keys() <= state.keys()
    assert state["model"].get("_ema", {}).keys() == dict(released["model"].get("_ema", {})).keys()
    assert state["task_state"] == released["task_state"]

    def compare(ours, theirs, where=""):
        """What we write of the settings is what the released code wrote, but for the rows of positions."""
        for key, value in ours.items():
            if isinstance(value, dict):
                compare(value, theirs[key], f"{where}.{key}")
            elif key not in ("max_length", "data"):
                assert theirs[key] == value, f"{where}.{key}"

    compare(state["cfg"], released["cfg"])


# --- checkpoints of this project --------------------------------------------------------------------------


def our_classifier(
    folder: Path, name: str = "last.pt", pooling: str = "cls", norm_eps: float | None = NORM_EPS,
    block: int = 0,
) -> Path:  # fmt: skip
    torch.manual_seed(0)
    audio = dict(clip_frames=64, norm_mean=-5.0, norm_std=3.0)
    config = dataclasses.replace(MODELS["tiny"], **audio)
    model = AudioClassifier(config, {"a": "A bird, singing", "b": "Bell"}, pooling, True, norm_eps, block)
    torch.nn.init.normal_(model.head.bias)
    save_checkpoint(
        folder / name, step=1, settings=dict(audio, loss="ce"), network=dataclasses.asdict(config),
        head=model.head_settings, classifier=model.state_dict(),
    )  # fmt: skip
    return folder / name


def test_a_classifier_comes_back_as_it_was(tmp_path):
    """Sizes, input, classes, names, pooling and eps come from the file, and the logits are the same bits."""
    path = our_classifier(tmp_path)
    state = torch.load(path, weights_only=True)
    state["head"] = dict(state["head"], pooling="mean", norm_eps=0.5)
    torch.save(state, path)
    model = AudioClassifier.from_pretrained(path)
    c = model.config
    assert (c.width, c.depth, c.clip_frames, c.norm_mean, c.norm_std) == (64, 2, 64, -5.0, 3.0)
    assert model.classes == {"a": "A bird, singing", "b": "Bell"} and list(model.classes) == ["a", "b"]
    assert model.exclusive and model.pooling == "mean" and model.fc_norm.eps == 0.5 and not model.training
    original = AudioClassifier(c, model.classes, "mean", exclusive=True, norm_eps=0.5).eval()
    original.load_state_dict(state["classifier"])
    spec = torch.randn(2, 1, 64, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(spec), original(spec))
        assert torch.equal(Encoder.from_pretrained(path)(spec), original.encoder(spec))


def test_a_classifier_that_keeps_bands_apart(tmp_path):
    """Its head sees mean and deviation over time of each of the 8 bands, low to high; the file says so."""
    model = AudioClassifier.from_pretrained(our_classifier(tmp_path, pooling="bands"))
    spec = torch.randn(2, 1, 50, 128, generator=torch.Generator().manual_seed(0))  # 3 x 8 patches
    with torch.no_grad():
        tokens = model.encoder(spec).double().numpy()
        logits = model(spec)
    weight = model.head.weight.double().detach().numpy()
    bias = model.head.bias.double().detach().numpy()
    for row, own in zip(tokens, logits):
        bands = [row[[1 + 8 * time + band for time in range(3)]] for band in range(8)]
        means = [np.mean(band, axis=0) for band in bands]
        deviations = [np.sqrt(np.var(band, axis=0) + 1e-6) for band in bands]
        x = np.concatenate(means + deviations)
        x = (x - x.mean()) / np.sqrt(x.var() + model.fc_norm.eps)  # its weight and bias are 1 and 0
        assert np.allclose(own, weight @ x + bias, atol=1e-5)


def test_a_run_folder_is_its_best_checkpoint_or_else_its_last(tmp_path):
    last = our_classifier(tmp_path)
    assert read_pretrained(tmp_path)["path"] == str(last)
    best = our_classifier(tmp_path, "best.pt")
    assert read_pretrained(tmp_path)["path"] == str(best)
    state = torch.load(best, weights_only=True)
    state["classifier"]["head.bias"] += 1
    torch.save(state, best)
    ours = AudioClassifier.from_pretrained(tmp_path).head.bias
    assert torch.equal(ours, AudioClassifier.from_pretrained(last).head.bias + 1)


MODEL_ALONE = """
import sys
sys.path.insert(0, '.')
import model
for path in sys.argv[1:]:
    try:
        print(list(model.AudioClassifier.from_pretrained(path).classes))
    except model.CheckpointError as error:
        print(error)
"""


def test_model_py_alone_reads_checkpoints_of_this_project(tmp_path):
    """Copied without the other files, it refuses only what is not of this project, in one line."""
    shutil.copy(ROOT / "model.py", tmp_path)
    path = our_classifier(tmp_path)
    whole = path.read_bytes()
    paths = [path, GOLDEN / "fairseq_finetuned.pt"]
    for size in (0, 20_000, len(whole) - 100):
        paths.append(tmp_path / f"damaged{size}.pt")
        paths[-1].write_bytes(whole[:size])
    command = [sys.executable, "-I", "-c", MODEL_ALONE, *paths]
    result = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, check=True)
    said = result.stdout.splitlines()
    assert len(said) == len(paths)
    assert said[0] == "['a', 'b']"
    assert "fairseq_finetuned.pt is not of this project" in said[1]
    for path, line in zip(paths[2:], said[2:]):
        assert line.startswith(f"{path} is not ")


@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), MemoryError(), RuntimeError("you can't allocate memory here")]
)
def test_what_cannot_be_read_now_is_not_put_aside(tmp_path, monkeypatch, error):
    """A disk or memory that fails says nothing of a checkpoint: it keeps its name, and no older is used."""
    our_classifier(tmp_path)
    our_classifier(tmp_path, "previous.pt")

    def fails(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch, pytest.raises(OSError, match="memory|Input/output error") as said:
        patch.setattr(torch, "load", fails)
        newest_checkpoint(tmp_path)
    assert "\n" not in str(said.value)
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "previous.pt"}
    assert newest_checkpoint(tmp_path) == tmp_path / "last.pt"


@pytest.mark.parametrize("name", ["heads", "decoder_groups", "patch_size", "mel_bins", "width", "depth"])
@pytest.mark.parametrize("value", [0, -1, 2**15])
def test_sizes_that_no_network_has(name, value):
    with pytest.raises(ValueError, match="^expected "):
        ModelConfig(**{name: value})


HEADS = list(itertools.product(POOLINGS, (None, 1e-6, 1e-5), (0, 1)))


@pytest.mark.parametrize("layout", ["own", "published", "fairseq.pt"])
def test_round_trip_of_our_classifiers(tmp_path, layout):
    """Through each layout that can hold it, and back: the same bits, sizes, input, classes and head."""
    n_written = 0
    for number, (pooling, norm_eps, block) in enumerate(HEADS):
        path = our_classifier(tmp_path, f"{number}.pt", pooling, norm_eps, block)
        out = tmp_path / f"out{number}"
        try:
            export(path, out, published=layout == "published")
        except CheckpointError:
            continue  # see test_export.py
        if layout == "fairseq.pt":
            out = out / layout
        if not out.exists():
            continue
        n_written += 1
        before = read_pretrained(path)
        after = read_pretrained(out)
        ours = before["classifier"]
        back = after["classifier"]
        assert ours.keys() == back.keys()
        assert all(torch.equal(ours[name], back[name]) for name in ours)
        assert before["head"] == after["head"]
        assert list(after["head"]["classes"]) == ["a", "b"]
        for name, value in before["network"].items():
            assert layout == "published" and "decoder" in name or after["network"][name] == value, name
        model = AudioClassifier.from_pretrained(out)
        assert model.classes == {"a": "A bird, singing", "b": "Bell"}
        assert model.exclusive
    assert n_written == {"own": 18, "published": 1, "fairseq.pt": 2}[layout]


def test_an_export_says_what_it_is(tmp_path):
    """As transformers resolves auto_map; and the card has what a user must know."""
    export(our_classifier(tmp_path), tmp_path / "my-eat")
    config = json.loads((tmp_path / "my-eat" / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_eat.EATModel"
    assert config["id2label"] == {"0": "A bird, singing", "1": "Bell"}
    for name in ("model.py", "modeling_eat.py", "front_end.py"):
        assert (tmp_path / "my-eat" / name).exists()
    card = (tmp_path / "my-eat" / "README.md").read_text()
    assert card.startswith("---\nlicense: other\nlicense_name: to-be-named\n")
    assert "{" not in card
    for words in (
        "# my-eat", "(x - (-5.0)) / (2 * 3.0)", "64 frames", "16 kHz mono", "A bird, singing, Bell",
        "of which a clip has exactly one", "**Licence**: to be named", "transformers>=4.57",
    ):  # fmt: skip
        assert words in card
    export(our_classifier(tmp_path), tmp_path / "licensed", licence="cc-by-4.0")
    card = (tmp_path / "licensed" / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-4.0\nlibrary_name")
    assert "**Licence**: cc-by-4.0." in card


def test_a_published_export_says_whose_code_reads_it(tmp_path):
    """As transformers resolves repository--module.Class; the names of the classes travel in id2label."""
    export(our_classifier(tmp_path, norm_eps=1e-5), tmp_path / "eat", published=True)
    config = json.loads((tmp_path / "eat" / "config.json").read_text())
    repository = "worstchan/EAT-base_epoch30_pretrain"
    assert config["auto_map"]["AutoModel"] == f"{repository}--modeling_eat.EATModel"
    assert config["auto_map"]["AutoConfig"] == f"{repository}--configuration_eat.EATConfig"
    assert not list((tmp_path / "eat").glob("*.py"))
    card = (tmp_path / "eat" / "README.md").read_text()
    assert "timm" in card
    assert "transformers<5" in card
    foreign = tmp_path / "foreign"  # without what we add for ourselves, the names still travel
    foreign.mkdir()
    save_file(weights_of(tmp_path / "eat"), foreign / "model.safetensors")
    (foreign / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "eat"}))
    assert list(AudioClassifier.from_pretrained(foreign).classes) == ["A bird, singing", "Bell"]


@pytest.mark.parametrize("published", [False, True])
def test_an_export_that_others_saved_anew(tmp_path, published):
    """Without the metadata of its tensors, and with the keys of its config sorted as text, it is the same."""
    config = dataclasses.replace(MODELS["tiny"], clip_frames=64, norm_mean=-5.0, norm_std=3.0)
    classes = {f"c{i}": f"Name {11 - i}" for i in range(12)}
    model = AudioClassifier(config, classes, exclusive=True, norm_eps=1e-5)
    save_checkpoint(
        tmp_path / "last.pt", step=1, network=dataclasses.asdict(config), head=model.head_settings,
        classifier=model.state_dict(),
    )  # fmt: skip
    export(tmp_path / "last.pt", tmp_path / "eat", published=published)
    path = tmp_path / "eat" / "model.safetensors"
    save_file(weights_of(tmp_path / "eat"), path, metadata=dict(format="pt"))
    settings = json.loads((tmp_path / "eat" / "config.json").read_text())
    (tmp_path / "eat" / "config.json").write_text(json.dumps(settings, sort_keys=True))
    again = AudioClassifier.from_pretrained(tmp_path / "eat")
    c = again.config
    assert (c.clip_frames, c.norm_mean, c.norm_std) == (64, -5.0, 3.0)
    assert again.head_settings == model.head_settings
    assert list(again.classes.items()) == list(classes.items())
    if published:
        del settings["eat"]  # as in folders of others, which hold names only
        (tmp_path / "eat" / "config.json").write_text(json.dumps(settings, sort_keys=True))
        foreign = AudioClassifier.from_pretrained(tmp_path / "eat")
        assert list(foreign.classes.values()) == list(classes.values())


def test_classes_of_the_same_name_come_from_a_foreign_folder(tmp_path):
    """Two of one name are two classes, by their numbers."""
    shutil.copytree(GOLDEN / "hf_finetuned", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    n = len(AudioClassifier.from_pretrained(tmp_path / "hf").classes)
    names = ["Animal", "Car", "Animal", *(f"name {i}" for i in range(3, n))]
    config["id2label"] = {str(i): name for i, name in enumerate(names)}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    model = AudioClassifier.from_pretrained(tmp_path / "hf")
    assert model.classes == {f"class {i}": name for i, name in enumerate(names)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_checkpoint_of_half_size(tmp_path, dtype):
    """As extras/runs/laptop/encoder.pt: its weights become fp32."""
    config = MODELS["tiny"]
    exact, teacher = EAT(config), Encoder(config)
    parts = {
        name: {k: v.to(dtype) for k, v in part.state_dict().items()}
        for name, part in (("student", exact), ("teacher", teacher))
    }
    save_checkpoint(tmp_path / "half.pt", step=1, network=dataclasses.asdict(config), **parts)
    for half, whole in zip(EAT.from_pretrained(tmp_path / "half.pt"), (exact, teacher)):
        for name, weight in half.named_parameters():
            assert weight.dtype == torch.float32
            assert torch.equal(weight, whole.get_parameter(name).to(dtype).float())


def test_a_run_folder_with_its_previous_checkpoint_only(tmp_path):
    """What a kill between the two renames of a save leaves behind, or a damaged last.pt."""
    config = MODELS["tiny"]
    for name in ("previous.pt", "last.pt", "best.pt"):
        model = AudioClassifier(config, {"a": name, "b": "B"})
        state = dict(network=dataclasses.asdict(config), head=model.head_settings)
        save_checkpoint(tmp_path / name, step=1, classifier=model.state_dict(), **state)
        assert AudioClassifier.from_pretrained(tmp_path).classes["a"] == name


def test_opening_a_checkpoint_needs_no_compiler():
    """torch initialises tensors on "meta" by its compiler, whose import takes seconds."""
    code = "import sys, model\nmodel.Encoder.from_pretrained(sys.argv[1])\n"
    code += "print('torch._dynamo' in sys.modules)"
    command = [sys.executable, "-c", code, ROOT / "extras" / "runs" / "laptop" / "encoder.pt"]
    assert subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout == "False\n"


def test_round_trip_of_a_pretraining_run(folder, script):
    """Student and teacher come out of the released layouts bit for bit, and training goes on from them."""
    args = "--model tiny --clip_frames 64 --mask_block_time 2 --mask_block_freq 2 --clones 2".split()
    args += "--batch_size 4 --updates 3 --warmup 1 --min_samples 1600 --workers 0 --ema_decay 0.5".split()
    script("pretrain.py", "--data", "manifest.tsv", *args, "--out_dir", "run")
    out = script("extras/released.py", "run", "out").stdout
    assert "fairseq.pt" in out
    student, teacher = EAT.from_pretrained(folder / "run")
    back, back_teacher = EAT.from_pretrained(folder / "out" / "fairseq.pt")
    hugging_face = Encoder.from_pretrained(folder / "out")
    for ours, theirs in ((student, back), (teacher, back_teacher), (student.encoder, hugging_face)):
        ours = ours.state_dict()
        theirs = theirs.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert back.config == student.config
    assert hugging_face.config == student.config
    assert not torch.equal(teacher.cls_token, student.encoder.cls_token)
    again = script("extras/released.py", "run", "out", check=False)
    assert again.returncode == 1
    assert again.stderr == "released.py: out is not an empty folder: choose another\n"
    still = "--init out/fairseq.pt --lr 1e-30 --ema_decay 1 --ema_decay_end 1".split()
    script("pretrain.py", "--data", "manifest.tsv", *args, "--out_dir", "more", *still)
    own, its_teacher = EAT.from_pretrained(folder / "more")
    released = teacher.state_dict()
    assert all(torch.equal(v, released[k]) for k, v in its_teacher.state_dict().items())
    torch.testing.assert_close(own.state_dict(), student.state_dict(), rtol=0, atol=1e-20)
    init = str(folder / "out" / "fairseq.pt")
    small = PretrainConfig(data=str(folder / "manifest.tsv"), model="small", init=init)
    with pytest.raises(CheckpointError, match="fairseq.pt is not a checkpoint of this model: ") as error:
        open_networks(small)
    assert "\n" not in str(error.value)


# --- what a checkpoint may hold ---------------------------------------------------------------------------


class Attack:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_settings_may_hold_inert_objects_and_nothing_else(tmp_path, monkeypatch):
    """A Namespace, numpy scalars and an enum of the released code are read past; code never runs."""
    module = types.ModuleType("EAT.data.modality")
    for name in ("EAT", "EAT.data", "EAT.data.modality"):
        monkeypatch.setitem(sys.modules, name, module)
    Modality = enum.Enum("Modality", "IMAGE AUDIO", module="EAT.data.modality", qualname="Modality")
    module.Modality = Modality
    state = torch.load(GOLDEN / "fairseq_pretrained.pt", weights_only=True)
    state["args"] = argparse.Namespace(lr=[0.1], nested=argparse.Namespace(seed=1))
    state["cfg"]["model"]["modalities"]["image"]["type"] = Modality.IMAGE
    state["extra_state"]["best"] = np.float64(0.5)
    state["extra_state"]["count"] = np.int32(3)
    torch.save(state, tmp_path / "objects.pt")
    monkeypatch.undo()
    assert Encoder.from_pretrained(tmp_path / "objects.pt").config.depth >= 1
    student, teacher = EAT.from_pretrained(tmp_path / "objects.pt")
    plain = EAT.from_pretrained(GOLDEN / "fairseq_pretrained.pt")[0].state_dict()
    assert all(torch.equal(v, plain[k]) for k, v in student.state_dict().items())
    with pytest.raises(CheckpointError, match="objects.pt .* holds Python objects, which could run code"):
        load_checkpoint(tmp_path / "objects.pt")  # what this project writes has no such objects

    for where in ("args", "cfg", "model"):
        state = torch.load(GOLDEN / "fairseq_pretrained.pt", weights_only=True)
        attack = Attack(tmp_path / "ran")
        state[where] = attack if where == "args" else dict(state[where], x=attack)
        torch.save(state, tmp_path / "attack.pt")
        with pytest.raises(CheckpointError, match="attack.pt .* holds Python objects, which could run code"):
            Encoder.from_pretrained(tmp_path / "attack.pt")
    assert not (tmp_path / "ran").exists()


def test_files_that_are_not_checkpoints_of_this_model(tmp_path):
    state = torch.load(GOLDEN / "fairseq_pretrained.pt", weights_only=True)

    def refused(name: str, message: str) -> None:
        with pytest.raises(CheckpointError, match=message) as error:
            Encoder.from_pretrained(tmp_path / name)
        assert "\n" not in str(error.value)

    refused("missing.pt", "there is no file .*missing.pt")
    (tmp_path / "empty").mkdir()
    refused("empty", "no checkpoint in")
    (tmp_path / "text.pt").write_text("hello")
    refused("text.pt", "not a checkpoint of this model, but a text file, 'hello'$")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    refused("tensor.pt", "holds a Tensor")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    refused("other.pt", "not a checkpoint of this model: it holds weights")
    torch.save(dict(state, model={}), tmp_path / "no_weights.pt")
    refused("no_weights.pt", "not a checkpoint of this model")
    torch.save(dict(state, model=dict(state["model"], mask_token=torch.zeros(1))), tmp_path / "more.pt")
    refused("more.pt", "holds mask_token")
    torch.save(dict(state, cfg={"model": {}}), tmp_path / "no_heads.pt")
    refused("no_heads.pt", "not a checkpoint of this model: 'modalities'")
    less = {k: v for k, v in state["model"].items() if k != "blocks.1.attn.qkv.bias"}
    torch.save(dict(state, model=less), tmp_path / "less.pt")
    refused("less.pt", "not a checkpoint of this model: .*state_dict for Encoder")
    whole = (GOLDEN / "fairseq_pretrained.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    refused("half.pt", "not a checkpoint of this model")
    shutil.copytree(GOLDEN / "hf_pretrained", tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"\0" * 100)
    refused("hf", "model.safetensors is not a checkpoint of this model")
    (tmp_path / "hf" / "config.json").write_text("{")
    refused("hf", "not a checkpoint of this model")


@pytest.mark.parametrize(
    "part, key, value",
    [
        ("network", "heads", 0), ("network", "heads", 2.0), ("network", "heads", -2),
        ("network", "width", 10**9), ("network", "width", 32), ("network", "width", 8192),
        ("network", "depth", 60_000), ("network", "depth", 1.5), ("network", "depth", 256),
        ("network", "patch_size", 0), ("network", "mel_bins", 2**14), ("network", "mel_bins", -128),
        ("network", "mlp_ratio", 8), ("network", "decoder_groups", 0), ("network", "drop_path", "x"),
        ("network", "drop_path", 1.0), ("network", "colour", "red"), ("network", "clip_frames", 0),
        ("network", "clip_frames", 10**12), ("network", "clip_frames", 64.5), ("network", "clip_frames", "x"),
        ("network", "norm_std", 0.0), ("network", "norm_std", "x"), ("network", "norm_mean", float("nan")),
        ("network", "norm_mean", None), ("head", "pooling", "x"), ("head", "norm_eps", "x"),
        ("head", "norm_eps", float("nan")), ("head", "classes", 5), ("head", "classes", ["a"]),
        ("head", "classes", {"a": "A", "b": 5}), ("head", "classes", {"a": "A"}), ("head", "colour", "red"),
        ("", "head", None), ("", "network", {}), ("", "network", 5),
        ("classifier", "head.bias", torch.tensor([0.0, float("nan")])),
        ("classifier", "head.bias", torch.tensor([0.0, float("inf")])),
        ("classifier", "head.bias", 5), ("head", "block", 3), ("head", "block", -1), ("head", "block", "x"),
    ],
)  # fmt: skip
def test_absurd_claims_are_one_line(tmp_path, part, key, value):
    """What a stranger's file says of sizes and names is compared with its tensors before memory is taken."""
    path = our_classifier(tmp_path)
    state = torch.load(path, weights_only=True)
    (state[part] if part else state)[key] = value
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of this model") as error:
        AudioClassifier.from_pretrained(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_numbers_of_another_type_become_fp32(tmp_path, dtype):
    path = our_classifier(tmp_path)
    state = torch.load(path, weights_only=True)
    state["classifier"]["head.bias"] = torch.tensor([3, -5], dtype=dtype)
    torch.save(state, path)
    assert AudioClassifier.from_pretrained(path).head.bias.tolist() == [3.0, -5.0]


def test_weights_that_are_integers_are_refused(tmp_path):
    path = our_classifier(tmp_path)
    state = torch.load(path, weights_only=True)
    state["classifier"]["head.bias"] = torch.tensor([3, -5])
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of this model: .*head.bias") as error:
        AudioClassifier.from_pretrained(path)
    assert "\n" not in str(error.value)


def test_a_checkpoint_without_a_classifier_is_one_line(tmp_path):
    path = our_classifier(tmp_path)
    state = torch.load(path, weights_only=True)
    torch.save(dict(state, classifier=None), path)
    with pytest.raises(CheckpointError, match="last.pt has no classifier"):
        AudioClassifier.from_pretrained(path)


def test_absurd_claims_take_no_memory(tmp_path):
    """Neither the weights nor the table of positions are made in sizes that the tensors do not have."""
    path = our_classifier(tmp_path)
    state = torch.load(path, weights_only=True)
    state["network"] |= dict(width=8192, mel_bins=512, mlp_ratio=8192)
    torch.save(state, path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError):
        AudioClassifier.from_pretrained(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_a_tensor_that_claims_more_than_it_stores_takes_no_memory(tmp_path):
    """A number repeated, in half precision: it is refused by its shape, not made 8 GiB large first."""
    path = our_classifier(tmp_path)
    state = torch.load(path, weights_only=True)
    state["classifier"]["encoder.cls_token"] = torch.zeros(1, dtype=torch.half).expand(2**31)
    torch.save(state, path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="size mismatch for encoder.cls_token"):
        AudioClassifier.from_pretrained(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@pytest.mark.parametrize(
    "kind, text",
    [
        ("a Git LFS pointer: run git lfs pull", "version https://git-lfs.github.com/spec/v1\noid sha256:4d"),
        ("an HTML page: download the file again", "<!DOCTYPE html>\n<html><head><title>Sign in</title>"),
        ("an XML page: download the file again", '<?xml version="1.0"?><Error>AccessDenied</Error>'),
        ("empty", ""),
    ],
)
def test_pointers_and_pages_are_called_that(tmp_path, kind, text):
    """In place of a .pt file, and of the weights of a Hugging Face folder."""
    shutil.copytree(GOLDEN / "hf_pretrained", tmp_path / "hf")
    weights = tmp_path / "hf" / "model.safetensors"
    for path, opened in ((tmp_path / "x.pt", tmp_path / "x.pt"), (weights, tmp_path / "hf")):
        path.write_text(text)
        with pytest.raises(CheckpointError) as error:
            Encoder.from_pretrained(opened)
        assert str(error.value) == f"{path} is not a checkpoint of this model, but {kind}"


@pytest.mark.parametrize(
    "change",
    [
        dict(network=5), dict(network=None), dict(network={}), dict(network={"width": 10**9}), dict(head=5),
        dict(head={"pooling": "x"}), dict(head={"colour": 1}), dict(classes=5), dict(classes=[["a"]]),
        dict(classes=[["a", "A"]]), dict(classes=[]), dict(classes=[["a", "A"], ["b", 5]]), dict(head=None),
    ],
)  # fmt: skip
def test_absurd_claims_of_a_folder_with_its_own_code(tmp_path, change):
    export(our_classifier(tmp_path), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match="is not a checkpoint of this model|has no classifier") as error:
        AudioClassifier.from_pretrained(tmp_path / "out")
    assert "\n" not in str(error.value)


def test_absurd_claims_of_a_hugging_face_folder(tmp_path):
    shutil.copytree(GOLDEN / "hf_pretrained", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    for key, value in (("num_heads", 0), ("mel_bins", 1e9), ("img_size", [5, 128]), ("img_size", 7)):
        (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(CheckpointError, match="not a checkpoint of this model"):
            Encoder.from_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="not a checkpoint of this model"):
        Encoder.from_pretrained(tmp_path / "hf")


def test_without_safetensors_the_message_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(CheckpointError, match="pip install safetensors$"):
        Encoder.from_pretrained(GOLDEN / "hf_pretrained")
