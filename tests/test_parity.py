"""The model, the losses, the gradients and five updates equal the numbers recorded from the released code.

`python -m pytest -s tests/test_parity.py` prints how near they are. The environment variable EAT_GOLDEN
chooses another recording, of another size: a folder with a pretrain.npz.
"""

import copy
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DEVICES

import pretrain
from evaluate import spread
from masking import count_visible, visible_ids
from model import EAT, ModelConfig, make_targets, sincos_2d, ufo_loss
from pretrain import PretrainConfig, train_step

GOLDEN = Path(os.environ.get("EAT_GOLDEN", Path(__file__).parent / "golden"))
PREFIX = "modality_encoders.IMAGE."


def our_name(released: str) -> str:
    """Name of a parameter of the released pre-training model in EAT."""
    for theirs, ours in (
        (PREFIX + "extra_tokens", "encoder.cls_token"),
        (PREFIX + "local_encoder.proj.", "encoder.patch_embed."),
        (PREFIX + "context_encoder.norm.", "encoder.norm_pre."),
        (PREFIX + "decoder.proj.", "decoder.proj."),
        ("blocks.", "encoder.blocks."),
    ):
        if released.startswith(theirs):
            return ours + released.removeprefix(theirs)
    layer, name = released.removeprefix(PREFIX + "decoder.blocks.").split(".0.")
    return f"decoder.blocks.{layer}.{name}"


@pytest.fixture(scope="module", params=DEVICES)
def golden(request) -> dict:
    """The recording, on a device; its "config" holds plain values."""
    torch.backends.cudnn.allow_tf32 = False  # as in a run
    with np.load(GOLDEN / "pretrain.npz", allow_pickle=False) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files if name != "config"}
        arrays["config"] = json.loads(str(file["config"]))
    for name in ("spec", "steps/spec"):
        arrays[name] = arrays[name].float()
    return {name: x.to(request.param) if isinstance(x, torch.Tensor) else x for name, x in arrays.items()}


def under(golden: dict, prefix: str) -> dict:
    """The arrays below `prefix`, by our names."""
    return {our_name(k.removeprefix(prefix)): v for k, v in golden.items() if k.startswith(prefix)}


@pytest.fixture
def student(golden) -> EAT:
    eat = EAT(model_config(golden["config"]))
    eat.load_state_dict(under(golden, "student/"))
    return eat.to(golden["spec"].device)


@pytest.fixture
def teacher(golden, student):
    encoder = copy.deepcopy(student.encoder).requires_grad_(False)
    encoder.load_state_dict({k.removeprefix("encoder."): v for k, v in under(golden, "teacher/").items()})
    return encoder


def model_config(c: dict) -> ModelConfig:
    return ModelConfig(
        patch_size=c["patch"], mel_bins=c["mel_bins"], clip_frames=c["frames"], width=c["width"],
        depth=c["depth"], heads=c["heads"], mlp_ratio=c["mlp_ratio"], decoder_depth=c["decoder_depth"],
        decoder_kernel=c["decoder_kernel"], decoder_groups=c["decoder_groups"],
    )  # fmt: skip


def utterance_weight(c: dict) -> float:
    return c["utterance_weight_as_released"] * c["clips"] * c["clones"]


def no_noise(mask, network):
    return torch.zeros(*mask.shape, network.width, device=mask.device)


def run(golden, student, teacher, noise):
    c = golden["config"]
    spec = golden["spec"]
    mask = golden["mask"]
    ids_keep = visible_ids(mask, c["visible"])
    with torch.no_grad():
        targets = make_targets(teacher.ffn_outputs(spec))
    return targets, student(spec, mask, ids_keep, targets, noise, utterance_weight(c))


def assert_near(name, ours, theirs, relative):
    """Equal up to `relative` of the largest entry."""
    ours = torch.as_tensor(ours).detach().cpu()
    theirs = torch.as_tensor(theirs).cpu()
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    print(f"\n{name}: {error:.1e} of the largest entry, {relative:.0e} allowed", end="")
    assert error <= relative, name


def test_positions(golden):
    theirs = golden["positions_first_rows"].cpu()
    H, W = golden["config"]["grid"]
    ours = sincos_2d(768, W, theirs.shape[1])
    torch.testing.assert_close(ours[: H * W], theirs[: H * W], rtol=0, atol=1e-6)


def test_visible_count(golden):
    c = golden["config"]
    assert count_visible(math.prod(c["grid"]), c["mask_ratio"]) == c["visible"]
    assert ((~golden["mask"]).sum(1) == c["visible"]).all()


def test_forward(golden, student, teacher):
    spec = golden["spec"]
    mask = golden["mask"]
    ids_keep = visible_ids(mask, golden["config"]["visible"])
    with torch.no_grad():
        assert_near("visible tokens", student.encoder(spec, ids_keep), golden["encoder_out"], 1e-5)
        assert_near("all tokens", student.encoder(spec), golden["features"], 1e-5)
        half = spec[:, :, : spec.shape[2] // 2]
        assert_near("half a clip", student.encoder(half), golden["features_half_length"], 1e-5)
        targets, out = run(golden, student, teacher, no_noise(mask, student.config))
    assert_near("targets", targets, golden["targets"], 1e-5)
    assert_near("predictions", out["pred"], golden["decoder_out"], 1e-5)


@pytest.mark.parametrize("prefix", ["", "noise_"])
def test_losses(golden, student, teacher, prefix):
    noise = golden["noise_decoder_in"] if prefix else no_noise(golden["mask"], student.config)
    _, out = run(golden, student, teacher, noise)
    assert_near("predictions", out["pred"], golden[prefix + "decoder_out"], 1e-5)
    for ours, theirs in (("loss", "loss"), ("loss_frame", "loss_frame"), ("loss_utterance", "loss_cls")):
        assert_near(prefix + ours, out[ours], golden[prefix + theirs], 1e-5)


def test_gradients(golden, student, teacher):
    _, out = run(golden, student, teacher, no_noise(golden["mask"], student.config))
    out["loss"].backward()
    theirs = under(golden, "grad/")
    assert theirs.keys() == dict(student.named_parameters()).keys()
    for name, p in student.named_parameters():
        assert_near(f"gradient of {name}", p.grad, theirs[name], 1e-4)


def test_spread(golden, student, teacher):
    mask = golden["mask"]
    targets, out = run(golden, student, teacher, no_noise(mask, student.config))
    targets = targets.repeat_interleave(golden["config"]["clones"], 0)
    assert_near("target_std", spread(targets[mask]), golden["target_var"], 1e-5)
    assert_near("pred_std", spread(out["pred"][mask]), golden["pred_var"], 1e-5)


@pytest.mark.parametrize("by_clip", [False, True])
def test_trajectory(golden, student, teacher, by_clip, monkeypatch):
    """Five updates, whole or accumulated by clip: losses, gradient norms, schedules, networks at the end."""
    c = golden["config"]
    accumulate = c["clips"] if by_clip else 1
    network = student.config
    monkeypatch.setitem(pretrain.MODELS, "tiny", network)
    config = PretrainConfig(
        model="tiny", clip_frames=c["frames"], mask_ratio=c["mask_ratio"], clones=c["clones"],
        utterance_weight=utterance_weight(c), batch_size=c["clips"], accumulate=accumulate,
        ema_decay=c["ema_start"], ema_decay_end=c["ema_end"], ema_anneal=c["ema_anneal_steps"],
        lr=c["lr_peak"], warmup=c["warmup"], updates=c["updates"], beta1=c["betas"][0], beta2=c["betas"][1],
        weight_decay=c["weight_decay"], clip_norm=c["clip_norm"],
    )  # fmt: skip
    adam = dict(betas=c["betas"], eps=c["adam_eps"], weight_decay=config.weight_decay, fused=True)
    optimizer = torch.optim.AdamW(student.parameters(), **adam)
    scaler = torch.amp.GradScaler(golden["spec"].device.type, enabled=False)
    for step, (specs, masks) in enumerate(zip(golden["steps/spec"], golden["steps/mask"])):
        parts = [
            (spec, mask, no_noise(mask, network))
            for spec, mask in zip(specs.chunk(accumulate), masks.chunk(accumulate))
        ]
        if step:  # the released code applies the decay of update n when update n + 1 begins
            decay = golden["steps/ema_decay"][step].item()
            assert pretrain.ema_decay(step, config) == pytest.approx(decay, rel=1e-9)
        out = train_step(student, teacher, optimizer, scaler, parts, step, config, torch.float32)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(golden["steps/lr"][step].item(), rel=1e-9)
        for ours, theirs in (
            ("loss", "loss"), ("loss_frame", "loss_frame"), ("loss_utterance", "loss_cls"),
            ("grad_norm", "grad_norm"),
        ):  # fmt: skip
            assert_near(f"update {step}: {ours}", out[ours], golden["steps/" + theirs][step], 1e-5)

    theirs = {f"teacher.{k}": v for k, v in under(golden, "steps/teacher/").items()}
    theirs |= under(golden, "steps/student/")
    ours = {f"teacher.encoder.{k}": v for k, v in teacher.named_parameters()}
    ours |= dict(student.named_parameters())
    assert theirs.keys() == ours.keys()
    worst = 0.0
    for name, p in ours.items():
        difference = (p - theirs[name]).abs().detach()
        if name.endswith("qkv.bias"):  # the keys' third has no true gradient: softmax ignores a constant
            difference = torch.cat([difference.chunk(3)[0], difference.chunk(3)[2]])
        worst = max(worst, difference.max().item())
    print(f"\nweights after five updates: {worst:.1e} at most, 2e-04 allowed", end="")
    assert worst <= 2e-4


def test_ufo_loss_is_a_mean_over_rows_and_masked_patches():
    """Against loops, so that the weight of a clone or a clip does not depend on how many there are."""
    generator = torch.Generator().manual_seed(0)
    B = 2
    C = 3
    N = 8
    D = 5
    pred = torch.randn(B * C, N, D, generator=generator)
    cls = torch.randn(B * C, D, generator=generator)
    targets = torch.randn(B, N, D, generator=generator)
    mask = torch.rand(B * C, N, generator=generator).argsort(1) < 6
    masked = [(r, n) for r in range(B * C) for n in range(N) if mask[r, n]]
    frame = [(pred[r, n] - targets[r // C, n]).square().mean() for r, n in masked]
    utterance = [(cls[r] - targets[r // C].mean(0)).square().mean() for r in range(B * C)]
    ours = ufo_loss(pred, cls, targets, mask)
    torch.testing.assert_close(ours, (torch.stack(frame).mean(), torch.stack(utterance).mean()))
