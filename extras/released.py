"""Weights in the layouts of others: read by model.read_pretrained, and written.

    python extras/released.py CKPT DIR              a Hugging Face folder with its code and a model card, and
                                                    fairseq.pt, for the released code
    python extras/released.py CKPT DIR --published  the folder as published, for the published code
    python extras/released.py CKPT DIR --onnx       with model.onnx too: samples in, probabilities out

CKPT is any checkpoint that model.read_pretrained knows. Weights are kept bit for bit, and a layout is
not written if its code would compute something else. No code in a file that is read is run. The Hugging Face
layouts, which need the package safetensors, have neither decoder nor teacher. extras/export.py writes the
layouts, extras/graphs.py the ONNX file.
"""

import argparse
import json
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from model import (  # noqa: E402
    MAX_PATCH_ROWS, NORM_EPS, CheckpointError, ModelConfig, load_checkpoint, refusing, sincos_2d,
)  # fmt: skip

# How tensor names begin here, and in the released layouts
HUGGING_FACE_NAMES = (  # all behind "model."
    ("encoder.cls_token", "extra_tokens"),
    ("encoder.patch_embed.", "local_encoder.proj."),
    ("encoder.norm_pre.", "pre_norm."),
    ("encoder.blocks.", "blocks."),
    ("pos_embed", "fixed_positional_encoder.positions"),
)
IMAGE = "modality_encoders.IMAGE."
FAIRSEQ_NAMES = (  # of a fine-tuned file behind "model."
    ("encoder.cls_token", IMAGE + "extra_tokens"),
    ("encoder.patch_embed.", IMAGE + "local_encoder.proj."),
    ("encoder.norm_pre.", IMAGE + "context_encoder.norm."),
    ("encoder.blocks.", "blocks."),
    ("decoder.blocks.", IMAGE + "decoder.blocks."),  # 0.weight is their 0.0.weight
    ("decoder.proj.", IMAGE + "decoder.proj."),
    ("pos_embed", IMAGE + "fixed_positional_encoder.positions"),
)
Names = tuple[tuple[str, str], ...]

PUBLISHED_CODE = "worstchan/EAT-base_epoch30_pretrain"  # a repository on the Hub
PUBLISHED_EPS = 1e-5  # of the LayerNorm before the head, in that code; in fairseq's it is ours, 1e-6
NORMALISATION = {  # flags of fairseq's task settings
    "esc50_eval": (-6.627, 5.359),
    "spcv2_eval": (-6.846, 5.565),
}
AUDIOSET = (-4.268, 4.569)

# What released files hold beside tensors and plain values, in their settings: read as inert placeholders
INERT_TYPES = (
    "argparse.Namespace", "numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
    "EAT.data.modality.Modality", "data2vec.data.modality.Modality",
    "examples.data2vec.data.modality.Modality",
)  # fmt: skip


class Inert:
    """Takes the place of an object of INERT_TYPES, whose contents are dropped."""

    def __init__(self, *_):
        pass

    def __setstate__(self, _):
        pass


# ----- Read ------------------------------------------------------------------------------------------------


def read_released(path: str, state: dict) -> dict:
    """What model.read_pretrained returns, of released weights: a fairseq file, a Hugging Face folder or the
    name of one on the Hub (owner/name). `state` is what load_checkpoint has read from it, {} if it failed.
    Raises CheckpointError."""
    is_name = re.fullmatch(r"(?!runs/)[\w.-]+/[\w.-]+", path)  # runs/NAME is a run folder, even if missing
    if is_name and not os.path.lexists(os.path.dirname(path)):
        path = fetch(path)
    weights = os.path.join(path, "model.safetensors")
    if os.path.isfile(weights):
        path = weights
    if os.path.isdir(path):
        raise CheckpointError(f"no checkpoint in {path}: looked for best.pt, last.pt and model.safetensors")
    if os.path.isfile(path):
        check_kind(path)
    if path.endswith(".safetensors"):
        with refusing(path):
            return from_hugging_face(Path(path))
    if not state:
        with torch.serialization.safe_globals([(Inert, name) for name in INERT_TYPES]):
            state = load_checkpoint(path)
    with refusing(path):
        if not isinstance(state.get("model"), dict) or not isinstance(state.get("cfg"), dict):
            raise ValueError(f"it holds {', '.join(map(str, list(state)[:5]))}")
        return from_fairseq(state)


def check_kind(path: str) -> None:
    """Raise CheckpointError for a file that is evidently something else, such as a Git LFS pointer or an HTML
    page, and OSError if it cannot be opened."""
    from extras.media import what_is

    with open(path, "rb"):
        kind = what_is(path)
    if kind:
        raise CheckpointError(f"{path} is not a checkpoint of this model, but {kind}")


def fetch(name: str) -> str:
    """Download config and weights of a model on the Hugging Face Hub, never code: their folder. What has been
    downloaded before is kept. Raises CheckpointError."""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        cure = "to look for it on the Hugging Face Hub: pip install huggingface_hub safetensors"
        raise CheckpointError(f"there is no file or folder {name}; {cure}") from None
    try:
        folder = os.path.dirname(hf_hub_download(name, "config.json"))
        commit = os.path.basename(folder)
        hf_hub_download(name, "model.safetensors", revision=commit)
    except Exception as error:  # whatever its HTTP library makes of the network
        reason = str(error).strip() or "no more"
        reason = f"{type(error).__name__}: {reason.splitlines()[0]}"
        raise CheckpointError(f"there is no file or folder {name}, nor on the Hub ({reason})") from None
    return folder


def our_name(name: str, names: Names, prefix: str) -> str:
    """Our name for a released tensor. Raises ValueError if this model has no such tensor."""
    for ours, theirs in names:
        if name.startswith(prefix + theirs):
            own = ours + name.removeprefix(prefix + theirs)
            if own.startswith("decoder.blocks."):
                own = own.replace(".0.", ".", 1)
            return own
    own = name.removeprefix("model.")
    if not own.startswith(("fc_norm.", "head.")):
        raise ValueError(f"it holds {name}, which this model does not have")
    return own


def to_ours(weights: dict[str, Tensor], names: Names, prefix: str) -> dict[str, Tensor]:
    """Released tensors under our names, in fp32, without the positions, which we compute. Raises ValueError
    for an unknown tensor, or if the positions are not the fixed ones."""
    found = {}
    for name, value in weights.items():
        found[our_name(name, names, prefix)] = value.float()
    table = found.pop("pos_embed")[0]                               # (N, D)
    width = table.shape[1]
    bands = 128 // found["encoder.patch_embed.weight"].shape[-1]
    fixed = sincos_2d(MAX_PATCH_ROWS, bands, width)[: len(table)]
    if len(table) > MAX_PATCH_ROWS * bands or not torch.allclose(table, fixed, rtol=0, atol=2e-3):
        raise ValueError("its positions are not the fixed sines and cosines")
    return found


def network_of(weights: dict[str, Tensor], claimed: dict) -> dict:
    """A ModelConfig's fields: from our tensors or, where these do not show them, from `claimed`."""
    width, _, patch_size, _ = weights["encoder.patch_embed.weight"].shape
    sizes = dict(claimed)
    sizes["width"] = width
    sizes["patch_size"] = patch_size
    sizes["depth"] = count(r"encoder\.blocks\.\d+\.mlp\.fc1\.bias", weights)
    sizes["mlp_ratio"] = len(weights["encoder.blocks.0.mlp.fc1.bias"]) // width
    if "decoder.blocks.0.weight" in weights:
        _, group, kernel, _ = weights["decoder.blocks.0.weight"].shape
        sizes["decoder_depth"] = count(r"decoder\.blocks\.\d+\.weight", weights)
        sizes["decoder_groups"] = width // group
        sizes["decoder_kernel"] = kernel
    return asdict(ModelConfig(**sizes))


def count(pattern: str, names: dict) -> int:
    return sum(re.fullmatch(pattern, name) is not None for name in names)


def name_classes(names: list[str], weights: dict[str, Tensor]) -> dict[str, str]:
    """A classifier's classes: label -> name, with numbers where names are missing or not unique."""
    numbered = [f"class {i}" for i in range(len(weights["head.bias"]))]
    if len(names) != len(numbered):
        names = numbered
    labels = names
    if len(set(names)) < len(names):
        labels = numbered
    return dict(zip(labels, names))


def from_fairseq(state: dict) -> dict:
    is_tuned = "head.weight" in state["model"]
    tuned = state["cfg"]["model"]
    model = tuned
    prefix = ""
    if is_tuned:
        model = tuned["pretrained_model_args"]["model"]
        prefix = "model."
    if model.get("layer_norm_first"):
        raise ValueError("its blocks are pre-norm, this model's are post-norm")
    tensors = dict(state["model"])
    teacher = tensors.pop("_ema", None)
    weights = to_ours(tensors, FAIRSEQ_NAMES, prefix)

    flags = state["cfg"].get("task") or {}
    mean, std = AUDIOSET
    for flag, values in NORMALISATION.items():
        if flags.get(flag):
            mean, std = values
    image = model["modalities"]["image"]
    decoder = image["decoder"]
    claimed = dict(
        heads=model["num_heads"], norm_mean=mean, norm_std=std,
        clip_frames=tuned["target_length"] if is_tuned else image["target_length"],
        # a fine-tuned file has no more of the decoder than these
        decoder_depth=decoder["decoder_layers"], decoder_kernel=decoder["decoder_kernel"],
        decoder_groups=decoder["decoder_groups"],
    )  # fmt: skip
    claimed.update(state.get("input", {}))  # written by `export`
    network = network_of(weights, claimed)
    if not is_tuned:
        teacher = to_ours(teacher, FAIRSEQ_NAMES, "") if teacher else {}
        teacher = {name.removeprefix("encoder."): value for name, value in teacher.items()}
        return dict(network=network, student=weights, teacher=teacher)

    labels = (state.get("task_state") or {}).get("labels") or {}
    labels = sorted(labels, key=lambda label: int(labels[label]))
    head = dict(
        classes=name_classes(labels, weights), exclusive=bool(flags.get("esc50_eval")), norm_eps=NORM_EPS,
        pooling="mean" if tuned.get("prediction_mode") == "MEAN_POOLING" else "cls",
    )  # fmt: skip
    head.update(state.get("head", {}))  # written by `export`
    weights = {name: value for name, value in weights.items() if not name.startswith("decoder.")}
    return dict(network=network, classifier=weights, head=head)


def from_hugging_face(path: Path) -> dict:
    try:
        from safetensors import safe_open
    except ImportError:
        need = "Hugging Face folders need the package safetensors: pip install safetensors"
        raise CheckpointError(need) from None
    config = json.loads(path.with_name("config.json").read_text(encoding="utf-8"))
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        ours = (file.metadata() or {}).get("eat")  # lost when others save the tensors anew
    if "network" in config:
        return from_own_folder(config, tensors)

    weights = to_ours(tensors, HUGGING_FACE_NAMES, "model.")
    ours = json.loads(ours or config.get("eat", "{}"))  # written by `export`
    if config.get("layer_norm_first") or config.get("norm_eps", NORM_EPS) != NORM_EPS:
        raise ValueError("its blocks are not those of the published models (layer_norm_first, norm_eps)")
    claimed = dict(heads=config["num_heads"], mel_bins=config["mel_bins"], clip_frames=config["img_size"][0])
    claimed.update(ours.get("input", {}))
    network = network_of(weights, claimed)
    if "head.weight" not in weights:
        return dict(network=network, student=weights, teacher=None)
    names = {int(i): name for i, name in config.get("id2label", {}).items()}  # in any order
    names = [names[i] for i in sorted(names)]
    head = dict(classes=name_classes(names, weights), norm_eps=PUBLISHED_EPS)
    head.update(ours.get("head", {}))
    return dict(network=network, classifier=weights, head=head)


def from_own_folder(config: dict, tensors: dict[str, Tensor]) -> dict:
    """Of a folder that brings modeling_eat.py: tensors have our names, behind "model."."""
    weights = {name.removeprefix("model."): value.float() for name, value in tensors.items()}
    if config["head"]:
        head = dict(config["head"], classes=dict(config["classes"]))
        return dict(network=config["network"], classifier=weights, head=head)
    student = {f"encoder.{name}": value for name, value in weights.items()}
    return dict(network=config["network"], student=student, teacher=None)


def main() -> int:
    from evaluate import Parser
    from extras import graphs
    from extras.export import export

    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("checkpoint", help="run folder, .pt file or released weights")
    parser.add_argument("folder", help="new folder")
    parser.add_argument("--published", action="store_true", help="for the published code of transformers 4")
    parser.add_argument("--onnx", action="store_true", help="write model.onnx, which takes 16 kHz samples")
    parser.add_argument("--pt2", action="store_true", help="write model.pt2, the same for torch.export.load")
    parser.add_argument("--licence", default="", help="of the weights, for the model card: mit, ...")
    args = parser.parse_args()
    graphs.check_packages(args.onnx)
    reason = export(args.checkpoint, args.folder, args.published, args.licence)
    files = ["config.json, model.safetensors, README.md (Hugging Face)"]
    if reason:
        print(f"no fairseq.pt, it would not be exact with the released code: {reason}", file=sys.stderr)
    else:
        files.append("fairseq.pt")
    if args.onnx or args.pt2:
        files += graphs.write(args.checkpoint, Path(args.folder), args.onnx, args.pt2)
    print(f"{args.folder}: {'; '.join(files)}")
    return 0


if __name__ == "__main__":
    from evaluate import run_script

    run_script(main)
