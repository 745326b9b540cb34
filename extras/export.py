"""Checkpoints in the layouts of others, for extras/released.py: a Hugging Face folder and fairseq.pt.

The folder brings its own code (model.py, front_end.py, modeling_eat.py) and computes what the checkpoint
does. The released layouts cannot express every pooling and norm: a layout is not written if its code would
compute something else.
"""

import json
import os
import re
import shutil
from pathlib import Path

import torch
from torch import Tensor

from extras.released import (
    FAIRSEQ_NAMES, HUGGING_FACE_NAMES, NORMALISATION, PUBLISHED_CODE, PUBLISHED_EPS, ROOT, Names,
)  # fmt: skip
from model import MAX_PATCH_ROWS, NORM_EPS, CheckpointError, read_pretrained, sincos_2d

WAVEFORM = """import soundfile, torch
from transformers import AutoModel

model = AutoModel.from_pretrained("{name}", trust_remote_code=True).eval()
samples, rate = soundfile.read("clip.wav", dtype="float32")  # 16 kHz mono
"""
SPECTROGRAM = "spec = model.spectrogram(torch.from_numpy(samples)[None])    # (1, 1, F, 128)\n"
USE_OF_ENCODER = f"""{WAVEFORM}{SPECTROGRAM}with torch.no_grad():
    tokens = model(spec).last_hidden_state                   # (1, 1 + N, width), the CLS token first"""
USE_OF_CLASSIFIER = f"""{WAVEFORM}{SPECTROGRAM}with torch.no_grad():
    probabilities = model.model.probabilities(model(spec).logits)[0]
print(model.config.id2label[int(probabilities.argmax())])"""
USE_OF_PUBLISHED_CODE = """import torch
from transformers import AutoModel  # below version 5; runs the code published with EAT

model = AutoModel.from_pretrained("{name}", trust_remote_code=True).eval()
with torch.no_grad():
    tokens = model.extract_features(spec)  # (B, 1, F, 128) -> (B, 1 + N, width), the CLS token first"""


def to_theirs(weights: dict[str, Tensor], names: Names, prefix: str, head_prefix: str) -> dict[str, Tensor]:
    """Our tensors by their names, and the table of positions."""
    width, _, patch_size, _ = weights["encoder.patch_embed.weight"].shape
    table = sincos_2d(MAX_PATCH_ROWS, 128 // patch_size, width)[None]  # (1, N, D)
    found = {}
    for name, value in [*weights.items(), ("pos_embed", table)]:
        released = head_prefix + name  # of fc_norm and head
        for ours, theirs in names:
            if name.startswith(ours):
                released = prefix + theirs + name.removeprefix(ours)
                released = re.sub(r"(decoder\.blocks\.\d+)\.", r"\1.0.", released)
        found[released] = value.float().contiguous()
    return found


def why_inexact(state: dict, poolings: tuple[str, ...], norm_eps: float) -> str:
    """Why code with these poolings and this norm computes other logits for a classifier, or ""."""
    head = state.get("head")
    if not head:
        return ""
    pooling = head.get("pooling", "cls")
    eps = head.get("norm_eps", NORM_EPS)
    block = head.get("block", 0)
    if pooling not in poolings:
        return f"it pools {pooling}, that code knows {' and '.join(poolings)}"
    if eps is None:
        return "it has no norm before its head, that code has one"
    if eps != norm_eps:
        return f"the norm before its head has eps {eps:g}, in that code {norm_eps:g}"
    if block not in (0, state["network"]["depth"]):
        return f"its head sees block {block}, in that code the last"
    return ""


def export(
    source: str | os.PathLike, folder: str | os.PathLike, published: bool = False, licence: str = ""
) -> str:
    """Write a checkpoint as a Hugging Face folder and, where the released code is exact, as fairseq.pt.
    Returns why there is no fairseq.pt, or "". Raises CheckpointError if the folder is not empty, if the
    checkpoint cannot be read, or if the published code would not be exact and `published` asks for it."""
    try:
        from safetensors.torch import save
    except ImportError:
        raise CheckpointError("this needs the package safetensors: pip install safetensors") from None
    state = read_pretrained(source)
    folder = Path(folder)
    reason = why_inexact(state, ("cls",), PUBLISHED_EPS)
    if published and reason:
        raise CheckpointError(f"{source} would not be exact with the published code: {reason}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} is not an empty folder: choose another")
    folder.mkdir(parents=True, exist_ok=True)

    head = state.get("head")
    weights = state["classifier"] if head else state["student"]
    encoder = {name: value for name, value in weights.items() if not name.startswith("decoder.")}
    if published:
        config = published_config(state)
        tensors = to_theirs(encoder, HUGGING_FACE_NAMES, "model.", "model.")
        metadata = dict(format="pt", eat=config["eat"])
    else:
        config = own_config(state)
        tensors = {}
        for name, value in encoder.items():
            if not head:
                name = name.removeprefix("encoder.")
            tensors[f"model.{name}"] = value.float().contiguous()
        metadata = dict(format="pt")
        shutil.copy(ROOT / "model.py", folder)
        shutil.copy(Path(__file__).with_name("modeling_eat.py"), folder)
        (folder / "front_end.py").write_text(front_end(), encoding="utf-8")
    (folder / "model.safetensors").write_bytes(save(tensors, metadata))
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    n_parameters = sum(value.numel() for value in encoder.values())
    card = model_card(folder.resolve().name, state, n_parameters, published, licence)
    (folder / "README.md").write_text(card, "utf-8", "surrogateescape")

    reason = why_inexact(state, ("cls", "mean"), NORM_EPS)
    if not reason:
        torch.save(fairseq_file(state), folder / "fairseq.pt")
    return reason


def own_config(state: dict) -> dict:
    """config.json of a folder that brings its own code, modeling_eat.py."""
    code = dict(AutoConfig="modeling_eat.EATConfig", AutoModel="modeling_eat.EATModel")
    config = dict(model_type="eat", architectures=["EATModel"], auto_map=code)
    config["network"] = state["network"]
    config["head"] = None
    if state.get("head"):
        head = dict(state["head"])
        classes = head.pop("classes")
        code["AutoModelForAudioClassification"] = "modeling_eat.EATModel"
        config["head"] = head
        config["classes"] = list(classes.items())  # a list keeps its order when others save the file anew
        config["id2label"] = numbered(classes)
    return config


def numbered(classes: dict[str, str]) -> dict[str, str]:
    """Names of classes by their number, as transformers wants them."""
    return {str(i): name for i, name in enumerate(classes.values())}


def published_config(state: dict) -> dict:
    """config.json as published, for the published code. "eat" has what only our code needs."""
    network = state["network"]
    head = state.get("head")
    width = network["width"]
    mel_bins = network["mel_bins"]
    ours = settings_of_ours(state)
    return dict(
        model_type="eat", architectures=["EATModel"], embed_dim=width, depth=network["depth"],
        num_heads=network["heads"], patch_size=network["patch_size"], stride=network["patch_size"],
        in_chans=1, mel_bins=mel_bins, max_length=MAX_PATCH_ROWS,
        num_classes=len(head["classes"]) if head else 527, model_variant="finetune" if head else "pretrain",
        mlp_ratio=float(network["mlp_ratio"]), qkv_bias=True, drop_rate=0.0, attn_drop_rate=0.0,
        activation_dropout=0.0, post_mlp_drop=0.0, start_drop_path_rate=0.0, end_drop_path_rate=0.0,
        layer_norm_first=False, norm_eps=NORM_EPS, norm_affine=True, fixed_positions=True,
        img_size=[network["clip_frames"], mel_bins], id2label=numbered(head["classes"] if head else {}),
        eat=json.dumps(ours),
        auto_map=dict(
            AutoConfig=f"{PUBLISHED_CODE}--configuration_eat.EATConfig",
            AutoModel=f"{PUBLISHED_CODE}--modeling_eat.EATModel",
        ),
    )  # fmt: skip


def settings_of_ours(state: dict) -> dict:
    """What the released layouts have no place for: the input's settings, and a classifier's."""
    network = state["network"]
    ours = dict(input={name: network[name] for name in ("clip_frames", "norm_mean", "norm_std")})
    if state.get("head"):
        ours["head"] = state["head"]
    return ours


def front_end() -> str:
    """The part of data.py that makes spectrograms, as a file that needs torch only."""
    source = (ROOT / "data.py").read_text(encoding="utf-8")
    constants = source[source.index("SAMPLE_RATE = ") : source.index("\nCLIP_FRAMES = ")]
    functions = source[source.index("def hz_to_mel(") : source.index("# ----- Files ")]
    head = '"""Waveforms -> spectrograms: a part of data.py."""\n\n'
    imports = "import functools\nimport math\n\nimport torch\nfrom torch import Tensor\n\n"
    return f"{head}{imports}{constants}\n\n{functions.rstrip()}\n"


def model_card(name: str, state: dict, n_parameters: int, published: bool, licence: str) -> str:
    """README.md of a Hugging Face folder: extras/model_card.md, filled in."""
    network = state["network"]
    head = state.get("head")
    if published:
        use = USE_OF_PUBLISHED_CODE
        needs = "`pip install torch timm safetensors \"transformers<5\"`"
    else:
        use = USE_OF_CLASSIFIER if head else USE_OF_ENCODER
        needs = "`pip install torch safetensors \"transformers>=4.57\"`; the example soundfile too"
    run = state.get("settings", {})
    training = ""
    if run.keys() >= {"batch_size", "data"}:
        data = Path(run["data"]).name
        training = f" Trained for {state['step']:,} updates of {run['batch_size']} clips from {data}."
    if licence:
        licence_tag = licence
        licence_text = f"{licence}."
    else:
        licence_tag = "other\nlicense_name: to-be-named"
        licence_text = "to be named by whoever trained it, here and in the first lines of this file."
    template = Path(__file__).with_name("model_card.md").read_text(encoding="utf-8")
    return template.format(
        name=name, what="fine-tuned" if head else "pre-trained without labels", training=training,
        parameters=f"{n_parameters:,}", needs=needs, seconds=network["clip_frames"] / 100,
        licence=licence_text, licence_tag=licence_tag, classes=card_of_classes(head),
        task="audio-classification" if head else "feature-extraction", use=use.format(name=name), **network,
    )  # fmt: skip


def card_of_classes(head: dict | None) -> str:
    """The model card's sentence about the classes, "" for an encoder."""
    if not head:
        return ""
    names = list(head["classes"].values())
    rule = "of which a clip may have several"
    if head.get("exclusive"):
        rule = "of which a clip has exactly one"
    listed = ", ".join(names[:20])
    if len(names) > 20:
        listed += f", and {len(names) - 20} more: see config.json"
    return f"\n\n**Classes**: {len(names)}, {rule}: {listed}."


def fairseq_file(state: dict) -> dict:
    """fairseq.pt: what the released code saves, without optimizer."""
    head = state.get("head")
    if head:
        classes = head["classes"]
        model = to_theirs(state["classifier"], FAIRSEQ_NAMES, "model.", "")
        labels = dict(labels={label: str(i) for i, label in enumerate(classes)})
    else:
        classes = {}
        model = to_theirs(state["student"], FAIRSEQ_NAMES, "", "")
        labels = {}
    if state.get("teacher"):
        teacher = {f"encoder.{name}": value for name, value in state["teacher"].items()}
        model["_ema"] = to_theirs(teacher, FAIRSEQ_NAMES, "", "")
    settings = fairseq_settings(state["network"], head)
    return dict(
        args=None, cfg=settings, model=model, criterion=None, optimizer_history=[], task_state=labels,
        extra_state={}, last_optimizer_state=None, **settings_of_ours(state),
    )  # fmt: skip


def fairseq_settings(network: dict, head: dict | None) -> dict:
    """The settings that the released code needs to build the network; it fills in the others."""
    width = network["width"]
    depth = network["depth"]
    clip_frames = network["clip_frames"]
    decoder = dict(
        decoder_dim=width, decoder_groups=network["decoder_groups"],
        decoder_kernel=network["decoder_kernel"], decoder_layers=network["decoder_depth"], input_dropout=0.0,
        decoder_residual=True, projection_layers=1,
    )  # fmt: skip
    image = dict(
        type="IMAGE", prenet_depth=0, num_extra_tokens=1, init_extra_token_zero=False, inverse_mask=True,
        model_depth=depth, decoder=decoder, in_chans=1, patch_size=network["patch_size"], embed_dim=width,
        fixed_positions=True, target_length=clip_frames, max_length=MAX_PATCH_ROWS,
    )  # fmt: skip
    model = dict(
        _name="data2vec_multi", depth=depth, num_heads=network["heads"], embed_dim=width,
        mlp_ratio=float(network["mlp_ratio"]), norm_eps=NORM_EPS, norm_affine=True, layer_norm_first=False,
        modalities=dict(image=image), supported_modality="IMAGE", average_top_k_layers=depth,
    )  # fmt: skip
    task = dict(
        _name="mae_image_pretraining", data=".", key="source", audio_mae=True, downsr_16hz=True,
        target_length=clip_frames,
    )  # fmt: skip
    for flag, values in NORMALISATION.items():
        task[flag] = (network["norm_mean"], network["norm_std"]) == values
    if not head:
        return dict(model=model, task=task)
    is_mean = head.get("pooling") == "mean"
    tuned = dict(
        _name="mae_image_classification", num_classes=len(head["classes"]), audio_mae=True,
        prediction_mode="MEAN_POOLING" if is_mean else "CLS_TOKEN", target_length=clip_frames,
        use_fc_norm=True, pretrained_model_args=dict(model=model, task=task),
    )  # fmt: skip
    return dict(model=tuned, task=dict(task, _name="mae_image_classification", key="imgs"))
