"""Released weights: read by model.read_pretrained, and written.

    python extras/released.py CKPT DIR    a Hugging Face folder with a model card; in it, fairseq.pt

Any checkpoint is a source, own or released; what was read comes out bit for bit. What is read is data:
nothing in a file is run. The Hugging Face layout, which needs the package safetensors, has neither decoder
nor teacher.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import (  # noqa: E402
    MAX_PATCH_ROWS, NORM_EPS, CheckpointError, ModelConfig, load_checkpoint, read_pretrained, refusing,
    sincos_2d,
)  # fmt: skip

# Ours, the fairseq name (of fine-tuned files behind "model."), the Hugging Face name (behind "model.")
IMAGE = "modality_encoders.IMAGE."
NAMES = (
    ("encoder.cls_token", IMAGE + "extra_tokens", "extra_tokens"),
    ("encoder.patch_embed.", IMAGE + "local_encoder.proj.", "local_encoder.proj."),
    ("encoder.norm_pre.", IMAGE + "context_encoder.norm.", "pre_norm."),
    ("encoder.blocks.", "blocks.", "blocks."),
    ("decoder.blocks.", IMAGE + "decoder.blocks.", None),
    ("decoder.proj.", IMAGE + "decoder.proj.", None),
    ("pos_embed", IMAGE + "fixed_positional_encoder.positions", "fixed_positional_encoder.positions"),
)
CODE = "worstchan/EAT-base_epoch30_pretrain--"  # its code for Hugging Face's transformers reads our exports
AUTO = dict(Config="configuration_eat.EATConfig", Model="modeling_eat.EATModel")
NORMS = {"esc50_eval": (-6.627, 5.359), "spcv2_eval": (-6.846, 5.565)}  # flags of fairseq's task settings

# What released files hold beside tensors and plain values, in their settings: read as inert placeholders
INERT_TYPES = (
    "argparse.Namespace", "numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
    "EAT.data.modality.Modality", "data2vec.data.modality.Modality",
    "examples.data2vec.data.modality.Modality",
)  # fmt: skip


class Inert:
    """In the place of an object of one of INERT_TYPES: whatever it was made of is dropped."""

    def __init__(self, *_):
        pass

    __setstate__ = __init__


def read_released(path: str, state: dict) -> dict:
    """What model.read_pretrained returns, of released weights: a fairseq file, of which `state` is what
    could be read without INERT_TYPES, a Hugging Face folder, or the name of one on the Hub (owner/name).
    Raises CheckpointError."""
    is_name = re.fullmatch(r"(?!runs/)[\w.-]+/[\w.-]+", path)  # runs/NAME is a run folder, even if missing
    if is_name and not os.path.lexists(os.path.dirname(path)):
        path = fetch(path)
    if os.path.isdir(path) and os.path.exists(os.path.join(path, "model.safetensors")):
        path = os.path.join(path, "model.safetensors")
    if os.path.isdir(path):
        raise CheckpointError(f"no checkpoint in {path}: looked for best.pt, last.pt and model.safetensors")
    if path.endswith(".safetensors"):
        with refusing(path):
            return from_hugging_face(Path(path))
    with torch.serialization.safe_globals([(Inert, name) for name in INERT_TYPES]):
        state = state or load_checkpoint(path)
    with refusing(path):
        if not isinstance(state.get("model"), dict) or not isinstance(state.get("cfg"), dict):
            raise ValueError(f"it holds {', '.join(map(str, list(state)[:5]))}")
        return from_fairseq(state)


def fetch(name: str) -> str:
    """The folder with config and weights of a model on the Hugging Face Hub, downloaded once; never code.
    Raises CheckpointError."""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        cure = "to look for it on the Hugging Face Hub: pip install huggingface_hub safetensors"
        raise CheckpointError(f"there is no file or folder {name}; {cure}") from None
    try:
        folder = os.path.dirname(hf_hub_download(name, "config.json"))
        hf_hub_download(name, "model.safetensors", revision=os.path.basename(folder))  # of the same commit
        return folder
    except Exception as error:  # whatever its HTTP library makes of the network
        said = f"{type(error).__name__}: {(str(error).strip() or 'no more').splitlines()[0]}"
        raise CheckpointError(f"there is no file or folder {name}, nor on the Hub ({said})") from None


def renamed(weights: dict[str, Tensor], column: int, prefix: str) -> dict[str, Tensor]:
    """Released weights by our names, fp32, without their positions, which must be the fixed ones: we compute
    them. Raises ValueError for a name that is not known."""
    found = {}
    for name, value in weights.items():
        for ours, *theirs in NAMES:
            theirs = prefix + theirs[column] if theirs[column] else None
            if theirs and (name == theirs or theirs.endswith(".") and name.startswith(theirs)):
                own = ours + name.removeprefix(theirs)
                own = own.replace(".0.", ".", 1) if own.startswith("decoder.blocks.") else own
                found[own] = value.float()
                break
        else:
            head = name.removeprefix("model.")
            if not head.startswith(("fc_norm.", "head.")):
                raise ValueError(f"it holds {name}, which this model does not have")
            found[head] = value.float()
    table = found.pop("pos_embed")[0]
    bands = 128 // found["encoder.patch_embed.weight"].shape[-1]
    fixed = sincos_2d(MAX_PATCH_ROWS, bands, table.shape[1])[: len(table)]
    if len(table) > MAX_PATCH_ROWS * bands or not torch.allclose(table, fixed, rtol=0, atol=2e-3):
        raise ValueError("its positions are not the fixed sines and cosines")
    return found


def network_of(weights: dict[str, Tensor], **claimed) -> dict:
    """The sizes of a network, read off its tensors, and what is `claimed` of it: a ModelConfig's fields."""
    width, _, patch_size, _ = weights["encoder.patch_embed.weight"].shape
    sizes = dict(width=width, patch_size=patch_size, depth=sum(k.endswith("mlp.fc1.bias") for k in weights))
    sizes |= dict(mlp_ratio=len(weights["encoder.blocks.0.mlp.fc1.bias"]) // width)
    if "decoder.blocks.0.weight" in weights:
        conv = weights["decoder.blocks.0.weight"]  # (D, D/groups, kernel, kernel)
        sizes |= dict(decoder_groups=width // conv.shape[1], decoder_kernel=conv.shape[2])
        sizes |= dict(decoder_depth=sum(bool(re.match(r"decoder\.blocks\.\d+\.weight", k)) for k in weights))
    return asdict(ModelConfig(**claimed | sizes))


def name_classes(labels: list[str], weights: dict[str, Tensor]) -> dict[str, str]:
    numbered = [f"class {i}" for i in range(len(weights["head.bias"]))]
    names = labels if len(labels) == len(numbered) else numbered
    return dict(zip(names if len({*names}) == len(names) else numbered, names))


def from_fairseq(state: dict) -> dict:
    cfg, is_tuned, flags = state["cfg"], "head.weight" in state["model"], state["cfg"].get("task") or {}
    model = cfg["model"]["pretrained_model_args"]["model"] if is_tuned else cfg["model"]
    if model.get("layer_norm_first"):
        raise ValueError("its blocks normalise first, these do so last")
    tensors = {name: value for name, value in state["model"].items() if name != "_ema"}
    weights = renamed(tensors, 0, "model." if is_tuned else "")
    frames = cfg["model"]["target_length"] if is_tuned else model["modalities"]["image"]["target_length"]
    mean, std = next((NORMS[flag] for flag in NORMS if flags.get(flag)), (-4.268, 4.569))
    claimed = dict(heads=model["num_heads"], clip_frames=frames, norm_mean=mean, norm_std=std)
    decoder = model["modalities"]["image"]["decoder"]  # of a fine-tuned file, only these settings are left
    claimed |= {f"decoder_{name}": decoder[f"decoder_{name}"] for name in ("kernel", "groups")}
    claimed |= dict(decoder_depth=decoder["decoder_layers"])
    network = network_of(weights, **claimed | state.get("input", {}))
    if not is_tuned:
        teacher = renamed(state["model"]["_ema"], 0, "") if "_ema" in state["model"] else {}
        teacher = {name.removeprefix("encoder."): value for name, value in teacher.items()}
        return dict(network=network, student=weights, teacher=teacher)
    labels = (state.get("task_state") or {}).get("labels") or {}
    head = dict(classes=name_classes(sorted(labels, key=lambda label: int(labels[label])), weights))
    head |= dict(pooling="mean" if cfg["model"].get("prediction_mode") == "MEAN_POOLING" else "cls")
    head |= dict(exclusive=bool(flags.get("esc50_eval")), norm_eps=NORM_EPS)
    weights = {k: v for k, v in weights.items() if not k.startswith("decoder.")}
    return dict(network=network, classifier=weights, head=head | state.get("head", {}))


def from_hugging_face(path: Path) -> dict:
    try:
        from safetensors import safe_open
    except ImportError:
        need = "Hugging Face folders need the package safetensors: pip install safetensors"
        raise CheckpointError(need) from None
    config = json.loads(path.with_name("config.json").read_text())
    with safe_open(path, "pt") as file:
        weights = renamed({name: file.get_tensor(name) for name in file.keys()}, 1, "model.")
        ours = (file.metadata() or {}).get("eat")  # written by `export`, lost when others save the tensors
    ours = json.loads(ours or config.get("eat", "{}"))
    if config.get("layer_norm_first") or config.get("norm_eps", NORM_EPS) != NORM_EPS:
        raise ValueError("its blocks are not those of the published models (layer_norm_first, norm_eps)")
    claimed = dict(heads=config["num_heads"], mel_bins=config["mel_bins"], clip_frames=config["img_size"][0])
    network = network_of(weights, **claimed | ours.get("input", {}))
    if "head.weight" not in weights:
        return dict(network=network, student=weights, teacher=None)
    names = {int(i): name for i, name in config.get("id2label", {}).items()}  # in any order
    classes = name_classes([names[i] for i in sorted(names)], weights)
    head = dict(classes=classes, norm_eps=1e-5)  # as the published code makes this norm
    return dict(network=network, classifier=weights, head=head | ours.get("head", {}))


def released(weights: dict[str, Tensor], column: int, prefix: str) -> dict[str, Tensor]:
    """Our names -> the released ones behind `prefix`; with the table of positions."""
    width, _, patch, _ = weights["encoder.patch_embed.weight"].shape
    found, table = {}, sincos_2d(MAX_PATCH_ROWS, 128 // patch, width)[None]
    for name, value in (weights | {"pos_embed": table}).items():
        for ours, *theirs in NAMES:
            if name.startswith(ours) and theirs[column]:
                name = prefix + theirs[column] + name.removeprefix(ours)
                name = re.sub(r"(decoder\.blocks\.\d+)\.", r"\1.0.", name)
                break
        else:  # fc_norm and head
            name = name if column == 0 else prefix + name
        found[name] = value.contiguous()
    return found


def export(source: str | os.PathLike, folder: str | os.PathLike) -> None:
    """Write a checkpoint in both released layouts, into an empty folder.
    Raises CheckpointError if the folder is not empty, the checkpoint cannot be read, or its classifier pools
    by the mean, which the published Hugging Face code cannot."""
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise CheckpointError("this needs the package safetensors: pip install safetensors") from None
    state, folder = read_pretrained(source), Path(folder)
    n, head = state["network"], state.get("head")
    if head and head.get("pooling", "cls") != "cls":
        raise CheckpointError(f"{source} pools {head['pooling']}: the published code knows CLS only")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} is not an empty folder: choose another")
    folder.mkdir(parents=True, exist_ok=True)
    ours = dict(input={k: n[k] for k in ("clip_frames", "norm_mean", "norm_std")})
    ours |= dict(head=head) if head else {}
    weights, classes = state["classifier"] if head else state["student"], head["classes"] if head else {}

    encoder = {k: v for k, v in weights.items() if not k.startswith("decoder.")}
    metadata = dict(format="pt", eat=json.dumps(ours))
    save_file(released(encoder, 1, "model."), folder / "model.safetensors", metadata=metadata)
    config = dict(
        model_type="eat", architectures=["EATModel"], embed_dim=n["width"], depth=n["depth"],
        num_heads=n["heads"], patch_size=n["patch_size"], stride=n["patch_size"], in_chans=1,
        mel_bins=n["mel_bins"], max_length=MAX_PATCH_ROWS, num_classes=len(classes) or 527,
        model_variant="finetune" if head else "pretrain", mlp_ratio=float(n["mlp_ratio"]), qkv_bias=True,
        drop_rate=0.0, attn_drop_rate=0.0, activation_dropout=0.0,
        post_mlp_drop=0.0, start_drop_path_rate=0.0, end_drop_path_rate=0.0, layer_norm_first=False,
        norm_eps=NORM_EPS, norm_affine=True, fixed_positions=True, img_size=[n["clip_frames"], n["mel_bins"]],
        id2label={str(i): name for i, name in enumerate(classes.values())},
        eat=metadata["eat"], auto_map={f"Auto{kind}": CODE + name for kind, name in AUTO.items()},
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    card = model_card(folder.resolve().name, state, sum(map(torch.numel, encoder.values())))
    (folder / "README.md").write_text(card, "utf-8", "surrogateescape")

    model = released(weights, 0, "model." if head else "")
    if state.get("teacher"):
        model["_ema"] = released({f"encoder.{k}": v for k, v in state["teacher"].items()}, 0, "")
    labels = {label: str(i) for i, label in enumerate(classes)}
    fairseq = dict(
        args=None, cfg=fairseq_settings(n, classes), model=model, criterion=None, optimizer_history=[],
        task_state=dict(labels=labels) if head else {}, extra_state={}, last_optimizer_state=None, **ours,
    )  # fmt: skip
    torch.save(fairseq, folder / "fairseq.pt")


def model_card(name: str, state: dict, n_parameters: int) -> str:
    """The README of an exported folder: extras/model_card.md, filled in."""
    run, training, classes, what = state.get("settings", {}), "", "", "pre-trained without labels"
    if run.keys() >= {"batch_size", "data"}:
        clips = f"{run['batch_size']} clips from {Path(run['data']).name}"
        training = f"Trained for {state['step']:,} updates of {clips}."
    if head := state.get("head"):
        what, names = "fine-tuned", list(head["classes"].values())
        classes = f" {len(names)} classes: {', '.join(names[:20])}{' ...' if len(names) > 20 else '.'}"
    template = Path(__file__).with_name("model_card.md").read_text()
    filled = dict(name=name, what=what, parameters=f"{n_parameters:,}", training=training, classes=classes)
    return template.format(**filled, **state["network"])


def fairseq_settings(n: dict, classes: dict) -> dict:
    """The settings that the released code needs to build the network; it fills in the others."""
    decoder = dict(
        decoder_dim=n["width"], decoder_groups=n["decoder_groups"], decoder_kernel=n["decoder_kernel"],
        decoder_layers=n["decoder_depth"], input_dropout=0.0, decoder_residual=True, projection_layers=1,
    )  # fmt: skip
    image = dict(
        type="IMAGE", prenet_depth=0, num_extra_tokens=1, init_extra_token_zero=False, inverse_mask=True,
        model_depth=n["depth"], decoder=decoder, in_chans=1, patch_size=n["patch_size"], embed_dim=n["width"],
        fixed_positions=True, target_length=n["clip_frames"], max_length=MAX_PATCH_ROWS,
    )  # fmt: skip
    model = dict(
        _name="data2vec_multi", depth=n["depth"], num_heads=n["heads"], embed_dim=n["width"],
        mlp_ratio=float(n["mlp_ratio"]), norm_eps=NORM_EPS, norm_affine=True, layer_norm_first=False,
        modalities=dict(image=image), supported_modality="IMAGE", average_top_k_layers=n["depth"],
    )  # fmt: skip
    task = dict(
        _name="mae_image_pretraining", data=".", key="source", audio_mae=True, downsr_16hz=True,
        target_length=n["clip_frames"],
        **{flag: (n["norm_mean"], n["norm_std"]) == norm for flag, norm in NORMS.items()},
    )  # fmt: skip
    if not classes:
        return dict(model=model, task=task)
    tuned = dict(
        _name="mae_image_classification", num_classes=len(classes), prediction_mode="CLS_TOKEN",
        audio_mae=True, target_length=n["clip_frames"], use_fc_norm=True,
        pretrained_model_args=dict(model=model, task=task),
    )  # fmt: skip
    return dict(model=tuned, task=dict(task, _name="mae_image_classification", key="imgs"))


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("checkpoint", help="run folder, .pt file or released weights")
    parser.add_argument("folder", help="new folder")
    args = parser.parse_args()
    export(args.checkpoint, args.folder)
    print(f"{args.folder}: config.json, model.safetensors and README.md (Hugging Face); fairseq.pt")
    return 0


if __name__ == "__main__":
    from evaluate import run_script
    run_script(main)
