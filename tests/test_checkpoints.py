"""Checkpoints of this project and of the released code: read alike, written alike, and never trusted.

EAT_GOLDEN chooses another recording, as in test_parity.py; the sizes come from its files.
"""

import argparse
import enum
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_parity import GOLDEN, assert_near

from model import (
    EAT,
    MODELS,
    AudioClassifier,
    AudioInput,
    CheckpointError,
    Encoder,
    export,
    load_checkpoint,
    read_pretrained,
    sincos_2d,
)
from pretrain import save_checkpoint

PRETRAINED = ["fairseq_pretrained.pt", "hf_pretrained"]
FINETUNED = ["fairseq_finetuned.pt", "hf_finetuned"]


@pytest.fixture(scope="module")
def golden() -> dict:
    with np.load(GOLDEN / "finetune.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return arrays | dict(config=json.loads(str(arrays["config"])), spec=torch.from_numpy(arrays["spec"]).float())


def weights_of(path) -> dict[str, torch.Tensor]:
    """Tensors of a released file by their own names."""
    if Path(path).is_dir():
        from safetensors.torch import load_file

        return load_file(Path(path) / "model.safetensors")
    weights = torch.load(path, weights_only=True)["model"]
    return {k: v for k, v in weights.items() if k != "_ema"}


# --- released files --------------------------------------------------------------------------------------------------


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
    assert model.audio == AudioInput(clip_frames=golden["config"]["frames"]) and not model.exclusive
    assert not model.training


@pytest.mark.parametrize("name", PRETRAINED)
def test_features_of_a_released_encoder(name):
    """After the five updates of pretrain.npz; its weights are known by name there."""
    with np.load(GOLDEN / "pretrain.npz", allow_pickle=False) as file:
        student = {k.removeprefix("steps/student/"): file[k] for k in file.files if k.startswith("steps/student/")}
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
    with pytest.raises(CheckpointError, match="encoder only"):
        EAT.from_pretrained(GOLDEN / "fairseq_finetuned.pt")
    with pytest.raises(CheckpointError, match="not fine-tuned"):
        AudioClassifier.from_pretrained(GOLDEN / "fairseq_pretrained.pt")


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
    assert torch.equal(encoder.pos_embed, exact.pos_embed)
    state["model"][positions] = torch.randn(1, 512, width)
    torch.save(state, tmp_path / "learned.pt")
    with pytest.raises(CheckpointError, match="positions are not the fixed"):
        Encoder.from_pretrained(tmp_path / "learned.pt")


# --- export ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRETRAINED + FINETUNED)
def test_export_has_the_published_keys_shapes_and_fields(tmp_path, name):
    is_tuned = name in FINETUNED
    export(GOLDEN / name, tmp_path / "out")
    theirs = GOLDEN / ("hf_finetuned" if is_tuned else "hf_pretrained")
    ours, published = weights_of(tmp_path / "out"), weights_of(theirs)
    assert ours.keys() == published.keys()
    for key, value in published.items():
        if key.endswith("positions"):  # the recording was made with 512 rows, the published models have 768 x 8
            assert ours[key].shape == (1, 6144, value.shape[2])
            torch.testing.assert_close(ours[key][:, : value.shape[1]], value, rtol=0, atol=1e-6)
        else:
            assert torch.equal(ours[key], value), key
    config, expected = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", theirs))
    assert list(config) == list(expected)
    different = {key for key in config if config[key] != expected[key]}
    assert different <= {"max_length"} | (set() if is_tuned else {"num_classes"})


@pytest.mark.parametrize("name", ["fairseq_pretrained.pt", "fairseq_finetuned.pt"])
def test_export_of_the_released_layout(tmp_path, name):
    export(GOLDEN / name, tmp_path / "out")
    ours, theirs = weights_of(tmp_path / "out" / "fairseq.pt"), weights_of(GOLDEN / name)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours if not k.endswith("positions"))
    state, released = (
        torch.load(path, weights_only=True) for path in (tmp_path / "out" / "fairseq.pt", GOLDEN / name)
    )
    assert released.keys() <= state.keys() and state["model"].get("_ema", {}).keys() == dict(
        released["model"].get("_ema", {})
    ).keys()
    assert state["task_state"] == released["task_state"]

    def compare(ours, theirs, where=""):
        """What we write of the settings is what the released code wrote, but for the rows of the position table."""
        for key, value in ours.items():
            if isinstance(value, dict):
                compare(value, theirs[key], f"{where}.{key}")
            elif key not in ("max_length", "data"):
                assert theirs[key] == value, f"{where}.{key}"

    compare(state["cfg"], released["cfg"])


def our_classifier(folder: Path) -> Path:
    torch.manual_seed(0)
    model = AudioClassifier(MODELS["tiny"], {"a": "A bird, singing", "b": "Bell"}, exclusive=True)
    torch.nn.init.normal_(model.head.bias)
    config = dict(clip_frames=64, norm_mean=-5.0, norm_std=3.0, pooling="cls", loss="ce")
    network = {k: getattr(model.encoder.config, k) for k in model.encoder.config.__dataclass_fields__}
    save_checkpoint(
        folder / "last.pt", step=1, config=config, network=network, classes=model.classes, norm_eps=1e-6,
        classifier=model.state_dict(),
    )  # fmt: skip
    return folder / "last.pt"


@pytest.mark.parametrize("layout", ["", "fairseq.pt"])
def test_round_trip_of_our_classifier(tmp_path, layout):
    """Through either layout and back: the same bits, sizes, classes, names and input."""
    path = our_classifier(tmp_path)
    export(path, tmp_path / "out")
    before, after = read_pretrained(path), read_pretrained(tmp_path / "out" / layout)
    for part in ("encoder", "head"):
        ours, back = getattr(before, part), getattr(after, part)
        assert ours.keys() == back.keys() and all(torch.equal(ours[k], back[k]) for k in ours)
    for name in ("audio", "classes", "exclusive", "pooling", "norm_eps"):
        assert getattr(before, name) == getattr(after, name), name
    assert after.classes == {"a": "A bird, singing", "b": "Bell"} and after.exclusive
    assert (before.network.width, before.network.depth) == (after.network.width, after.network.depth)


def test_round_trip_of_a_pretraining_run(folder, script):
    args = "--model tiny --clip_frames 64 --mask_block_time 2 --mask_block_freq 2 --clones 2 --batch_size 4".split()
    args += "--updates 3 --warmup 1 --min_samples 1600 --workers 0 --ema_decay 0.5".split()
    script("pretrain.py", "--data", "manifest.tsv", *args, "--out_dir", "run")
    out = script("model.py", "export", "run", "out").stdout
    assert "fairseq.pt" in out
    (student, teacher), (back, back_teacher) = (EAT.from_pretrained(folder / p) for p in ("run", "out/fairseq.pt"))
    hugging_face = Encoder.from_pretrained(folder / "out")
    for ours, theirs in ((student, back), (teacher, back_teacher), (student.encoder, hugging_face)):
        ours, theirs = ours.state_dict(), theirs.state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    again = script("model.py", "export", "run", "out", check=False)
    assert again.returncode == 1 and again.stderr == "model.py: out is not an empty folder: choose another\n"
    # and training goes on from a released file
    script("pretrain.py", "--data", "manifest.tsv", *args, "--out_dir", "more", "--init", "out/fairseq.pt")
    refused = script(
        "pretrain.py", "--data", "manifest.tsv", *args[2:], "--model", "small", "--out_dir", "other",
        "--init", "out/fairseq.pt", check=False,
    )  # fmt: skip
    assert "is of another size than --model small" in refused.stderr and refused.stderr.count("\n") == 1


def test_a_mean_pooled_classifier_is_not_exported(tmp_path):
    path = our_classifier(tmp_path)
    state = torch.load(path, weights_only=True)
    state["config"]["pooling"] = "mean"
    torch.save(state, path)
    assert AudioClassifier.from_pretrained(path).pooling == "mean"
    with pytest.raises(CheckpointError, match="pools by the mean"):
        export(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- what a checkpoint may hold --------------------------------------------------------------------------------------


class Attack:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_settings_may_hold_inert_objects_and_nothing_else(tmp_path, monkeypatch):
    """A Namespace, numpy scalars and an enum of the released code are read past; code is refused and never runs."""
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
    assert type(load_checkpoint(tmp_path / "objects.pt")["args"]).__name__ == "_Inert"

    for where in ("args", "cfg", "model"):
        state = torch.load(GOLDEN / "fairseq_pretrained.pt", weights_only=True)
        state[where] = Attack(tmp_path / "ran") if where == "args" else dict(state[where], x=Attack(tmp_path / "ran"))
        torch.save(state, tmp_path / "attack.pt")
        with pytest.raises(CheckpointError, match="attack.pt holds posix.system, .* refused"):
            Encoder.from_pretrained(tmp_path / "attack.pt")
    assert not (tmp_path / "ran").exists()


def test_files_that_are_not_checkpoints_of_this_model(tmp_path):
    state = torch.load(GOLDEN / "fairseq_pretrained.pt", weights_only=True)

    def refused(name: str, message: str) -> None:
        with pytest.raises(CheckpointError, match=message) as error:
            Encoder.from_pretrained(tmp_path / name)
        assert "\n" not in str(error.value)

    refused("missing.pt", "No such file")
    (tmp_path / "empty").mkdir()
    refused("empty", "no checkpoint in")
    (tmp_path / "text.pt").write_text("hello")
    refused("text.pt", "cannot read|damaged")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    refused("tensor.pt", "holds a Tensor")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    refused("other.pt", "not a checkpoint of this model: it holds weights")
    torch.save(dict(state, model={}), tmp_path / "no_weights.pt")
    refused("no_weights.pt", "not a checkpoint of this model")
    torch.save(dict(state, model=dict(state["model"], mask_token=torch.zeros(1))), tmp_path / "more.pt")
    refused("more.pt", "holds mask_token")
    torch.save(dict(state, cfg={"model": {}}), tmp_path / "no_heads.pt")
    refused("no_heads.pt", "no 'modalities'")
    less = {k: v for k, v in state["model"].items() if k != "blocks.1.attn.qkv.bias"}
    torch.save(dict(state, model=less), tmp_path / "less.pt")
    refused("less.pt", "another model: Missing key.*qkv.bias")
    whole = (GOLDEN / "fairseq_pretrained.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    refused("half.pt", "cannot read|damaged")
    shutil.copytree(GOLDEN / "hf_pretrained", tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"\0" * 100)
    refused("hf", "cannot read")
    (tmp_path / "hf" / "config.json").write_text("{")
    refused("hf", "cannot read|not a checkpoint")


@pytest.mark.parametrize(
    "part, key, value",
    [
        ("network", "heads", 0), ("network", "heads", 2.0), ("network", "heads", -2), ("network", "width", 10**9),
        ("network", "width", 32), ("network", "depth", 60_000), ("network", "depth", 1.5), ("network", "patch_size", 0),
        ("network", "mel_bins", 2**14), ("network", "mel_bins", -128), ("network", "mlp_ratio", 8),
        ("network", "decoder_groups", 0), ("network", "drop_path", "x"), ("network", "colour", "red"),
        ("config", "clip_frames", 0), ("config", "clip_frames", 10**12), ("config", "clip_frames", 64.5),
        ("config", "clip_frames", "x"), ("config", "norm_std", 0.0), ("config", "norm_std", "x"),
        ("config", "norm_mean", float("nan")), ("config", "norm_mean", None), ("config", "pooling", "x"),
        ("", "norm_eps", "x"), ("", "classes", 5), ("", "classes", ["a"]), ("", "classes", {"a": "A", "b": 5}),
        ("", "classes", {"a": "A"}), ("classifier", "head.bias", torch.tensor([0.0, float("nan")])),
    ],
)  # fmt: skip
def test_absurd_claims_are_one_line(tmp_path, part, key, value):
    """Whatever a stranger's file says of sizes and names is compared with its tensors before memory is taken for it."""
    path = our_classifier(tmp_path)
    state = torch.load(path, weights_only=True)
    (state[part] if part else state)[key] = value
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of this model|names 1 classes") as error:
        AudioClassifier.from_pretrained(path)
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


def test_without_safetensors_the_message_says_so():
    code = "import sys; sys.modules['safetensors'] = None; import model; model.Encoder.from_pretrained(sys.argv[1])"
    result = subprocess.run(
        [sys.executable, "-c", code, GOLDEN / "hf_pretrained"], cwd=ROOT, text=True, capture_output=True
    )
    assert "pip install safetensors" in result.stderr.splitlines()[-1]
