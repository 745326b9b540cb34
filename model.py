"""The EAT model: spectrogram in, tokens or loss out (EAT paper, arXiv 2401.03497, Sec. 3).

A student sees a few visible patches of a spectrogram and predicts what a teacher, an exponential moving average (EMA)
of the student, computes from the whole of it: for each masked patch its features (the frame loss), and with its CLS
token their mean over the clip (the utterance loss).

    Encoder        spectrogram -> tokens: a ViT with post-norm blocks; this is the class to copy for features
    make_targets   the teacher's feed-forward outputs -> what the student must predict
    Decoder        visible tokens -> a prediction for every patch: a small CNN
    EAT            student encoder + decoder -> the two losses (UFO: utterance-frame objective)
    AudioClassifier    encoder -> CLS token -> a score for each class

    python model.py                     sizes, and the shape of every stage
    python model.py export CKPT DIR     a checkpoint in the released layouts, Hugging Face and fairseq

`Encoder.from_pretrained(path)` and its siblings read this project's checkpoints and both released layouts. This file
needs torch only (safetensors too for Hugging Face folders) and can be copied alone.
Citations such as models/mae.py:404 point into the released code (github.com/cwx-worst-one/EAT at 06c1c34).

Shapes:
    B  clips                             H, W  patches in time and frequency: 64 x 8 for 10 s
    C  masked copies (clones) of a clip  N     patches of a clip: H * W = 512
    F  frames of 10 ms: 1024             V     visible patches: 102
    M  mel bins: 128                     D     width: 768
    T  tokens: CLS and patches           L     blocks: 12
Rows of a (B*C, ...) tensor are clone-minor: row b * C + c is copy c of clip b.
"""

import argparse
import json
import math
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

NORM_EPS = 1e-6  # the encoder's LayerNorms; target and decoder norms use PyTorch's 1e-5
MAX_PATCH_ROWS = 768  # longest input in patches of 16 frames: 768 * 0.16 s = 2 minutes


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the network; the defaults are EAT-base (released code: config/pretraining_AS2M.yaml)."""

    patch_size: int = 16
    mel_bins: int = 128
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: int = 4
    decoder_depth: int = 6
    decoder_kernel: int = 3
    decoder_groups: int = 16
    drop_path: float = 0.0

    def __post_init__(self):
        for name, value in asdict(self).items():
            if name != "drop_path" and not (type(value) is int and 0 < value <= 2**16):
                raise ValueError(f"{name} must be a whole number of reasonable size, not {value!r}")
        for ok, message in (
            (0 <= self.drop_path < 1, f"drop_path {self.drop_path} is not from 0 to 1"),
            (self.width % self.heads == 0, f"width {self.width} is not a multiple of heads {self.heads}"),
            (self.width % 4 == 0, f"width {self.width} is not a multiple of 4 (position channels)"),
            (self.width % self.decoder_groups == 0, f"width {self.width} is not a multiple of the decoder's groups"),
            (self.decoder_kernel % 2 == 1, f"decoder kernel {self.decoder_kernel} is even: its output would not align"),
            (self.mel_bins % self.patch_size == 0, f"{self.mel_bins} mel bins do not divide into patches"),
        ):
            if not ok:
                raise ValueError(message)

    def grid(self, frames: int) -> tuple[int, int]:
        """Patches in (time, frequency) of a spectrogram of `frames` frames."""
        return frames // self.patch_size, self.mel_bins // self.patch_size


MODELS = {
    "base": ModelConfig(),
    "large": ModelConfig(width=1024, depth=24, heads=16, decoder_depth=3, decoder_kernel=5),
    "small": ModelConfig(width=384, depth=12, heads=6),
    "demo": ModelConfig(width=192, depth=4, heads=3, decoder_depth=2),
    "tiny": ModelConfig(width=64, depth=2, heads=2, decoder_depth=1),
}


# ---------------------------------------------------------------------------------------------------------------------
# Encoder


def sincos_2d(rows: int, cols: int, width: int) -> Tensor:
    """Fixed positions of a rows x cols (time x frequency) grid, time-major: (rows * cols, width).

    Channels: [sin f | cos f | sin t | cos t], a quarter of the width each. The paper (Sec. 3.1) says 1-D positions;
    the released weights were trained with these (models/images.py:109-125).
    """
    omega = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float32) / (width // 4))  # (D/4,)
    t, f = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")           # (rows, cols)
    f_angle, t_angle = (axis.reshape(-1, 1) * omega for axis in (f, t))                    # (rows*cols, D/4)
    return torch.cat([f_angle.sin(), f_angle.cos(), t_angle.sin(), t_angle.cos()], dim=1)  # (rows*cols, D)


class Attention(nn.Module):
    """Multi-head self-attention with a fused qkv projection; (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, D // self.heads)           # (B, T, 3, heads, D/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)                         # 3 x (B, heads, T, D/heads)
        x = F.scaled_dot_product_attention(q, k, v)                            # (B, heads, T, D/heads)
        return self.proj(x.transpose(1, 2).reshape(B, T, D))                   # (B, T, D)


def recompute(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), for elementwise work: the backward pass computes it again from x instead of keeping its results.

    A linear layer at its end is not repeated: PyTorch stops at the last tensor it lacks, the input of that layer.
    """
    if not torch.is_grad_enabled():
        return function(x)
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)


class MLP(nn.Module):
    """Feed-forward network of a block; (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return recompute(lambda hidden: self.fc2(F.gelu(hidden)), self.fc1(x))


class DropPath(nn.Module):
    """Leave a residual branch out for a random part `rate` of the clips, in training only; (B, T, D) -> (B, T, D)."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        return x * x.new_empty(len(x), 1, 1).bernoulli_(1 - self.rate).div_(1 - self.rate)


class Block(nn.Module):
    """Post-norm transformer block: each residual sum is normalised after the addition (models/modules.py:259-324).

    Returns the new tokens and, because the targets are made of it, the bare output of the feed-forward network.
    """

    def __init__(self, config: ModelConfig, drop_path: float = 0.0):
        super().__init__()
        self.attn = Attention(config.width, config.heads)
        self.norm1 = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.mlp = MLP(config.width, config.mlp_ratio * config.width)
        self.norm2 = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm1(x + self.drop_path(self.attn(x)))
        ffn = self.mlp(x)
        return self.norm2(x + self.drop_path(ffn)), ffn


class Encoder(nn.Module):
    """Vision transformer over spectrogram patches; student and teacher are two of these.

    >>> tokens = Encoder(ModelConfig())(spec)  # spec (B, 1, F, M) -> tokens (B, 1+N, D), CLS first
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        D, P = config.width, config.patch_size
        self.patch_embed = nn.Conv2d(1, D, kernel_size=P, stride=P)
        self.cls_token = nn.Parameter(torch.empty(1, 1, D))
        pos_embed = sincos_2d(MAX_PATCH_ROWS, config.mel_bins // P, D)                  # (768*W, D)
        self.register_buffer("pos_embed", pos_embed, persistent=False)
        self.norm_pre = nn.LayerNorm(D, eps=NORM_EPS)
        rates = [config.drop_path * i / max(1, config.depth - 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList([Block(config, rate) for rate in rates])
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise as the released code does (EAT_pretraining.py:243-251).

        Not listed, and left as PyTorch makes them: the bias of patch_embed, the norms, the whole decoder.
        """
        nn.init.xavier_uniform_(self.patch_embed.weight.view(self.config.width, -1))
        nn.init.normal_(self.cls_token, std=1.0)  # not the usual 0.02
        for layer in self.blocks.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def embed(self, spec: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Patches with positions, the visible ones if ids_keep (B*C, V) is given, behind the CLS token.

        (B, 1, F, M) -> (B, 1+N, D) or (B*C, 1+V, D). Each clip is cut into patches once, whatever the number of clones.
        Frames that do not fill a patch are left out. Raises ValueError for spectrograms of another shape or too long.
        """
        if spec.ndim != 4 or spec.shape[1] != 1 or spec.shape[3] != self.config.mel_bins:
            raise ValueError(f"expected a spectrogram of (B, 1, F, {self.config.mel_bins}), got {tuple(spec.shape)}")
        if not self.config.patch_size <= spec.shape[2] < (MAX_PATCH_ROWS + 1) * self.config.patch_size:
            raise ValueError(f"{spec.shape[2]} frames: the encoder takes 1 to {MAX_PATCH_ROWS} patches in time")
        x = self.patch_embed(spec).flatten(2).transpose(1, 2)                           # (B, N, D)
        x = x + self.pos_embed[: x.shape[1]]                                            # a longer clip: more rows of it
        if ids_keep is not None:
            B, N, D = x.shape
            first = N * torch.arange(B, device=x.device)[:, None]                       # (B, 1)
            rows = (first + ids_keep.reshape(B, -1)).flatten()                           # (B*C*V,)
            x = x.reshape(B * N, D).index_select(0, rows).view(*ids_keep.shape, D)      # (B*C, V, D)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)            # (B, 1+N, D), (B*C, 1+V, D)
        return self.norm_pre(x)

    def forward(self, spec: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Encode all patches, or the visible ones: (B, 1, F, M) -> (B, 1+N, D) or (B*C, 1+V, D), CLS first."""
        x = self.embed(spec, ids_keep)
        for block in self.blocks:
            x, _ = block(x)
        return x

    def layers(self, spec: Tensor) -> list[Tensor]:
        """Tokens after every block, for all patches: L x (B, 1+N, D); the last is what forward returns."""
        x, outputs = self.embed(spec), []
        for block in self.blocks:
            x, _ = block(x)
            outputs.append(x)
        return outputs

    def ffn_outputs(self, spec: Tensor) -> list[Tensor]:
        """Feed-forward output of every block for all patches, without CLS: L x (B, N, D)."""
        x, outputs = self.embed(spec), []
        for block in self.blocks:
            x, ffn = block(x)
            outputs.append(ffn[:, 1:])
        return outputs

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, teacher: bool = False) -> "Encoder":
        """The encoder of any checkpoint that read_pretrained knows, in eval mode; with its `audio`: AudioInput.

        Of a pre-training run it is the student, as the released code uses it, or with `teacher` its moving average.
        """
        found = read_pretrained(path)
        weights = found.teacher if teacher else found.encoder
        if weights is None:
            raise CheckpointError(f"{path} has no teacher: it is not a pre-training checkpoint")
        encoder = cls(found.network)
        encoder.audio = found.audio
        return _load(encoder, weights, path)


# ---------------------------------------------------------------------------------------------------------------------
# Pre-training: targets, decoder, loss


def make_targets(ffn_outputs: list[Tensor]) -> Tensor:
    """Average the blocks' outputs into targets: L x (B, N, D) -> (B, N, D), fp32 (EAT_pretraining.py:785-828).

    Each block is first normalised per clip and channel over its patches, so that no block dominates and no constant
    offset can be predicted; the average is then normalised over channels. The paper (Sec. 3.2) says "outputs of all
    layers"; in the released code they are the outputs of the feed-forward networks, before residual and norm.
    """
    mean = sum(F.instance_norm(y.float().transpose(1, 2)) for y in ffn_outputs) / len(ffn_outputs)  # (B, D, N)
    return F.layer_norm(mean.transpose(1, 2), mean.shape[1:2])                                      # (B, N, D)


class Decoder(nn.Module):
    """CNN that predicts every patch from the visible ones (paper Sec. 3.3; models/modules.py:182-230).

    Released code beyond the paper: grouped convolutions, a residual around each layer, norms without affine, a final
    linear layer, and small noise instead of a learned mask token; positions are implied by the grid.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, kernel = config.width, config.decoder_kernel
        self.blocks = nn.ModuleList(
            nn.Conv2d(D, D, kernel, padding=kernel // 2, groups=config.decoder_groups)
            for _ in range(config.decoder_depth)
        )
        self.proj = nn.Linear(D, D)

    def forward(self, tokens: Tensor, ids_keep: Tensor, noise: Tensor, grid: tuple[int, int]) -> Tensor:
        """tokens (B*C, V, D) in their places among `noise` (B*C, N, D) -> (B*C, N, D)."""
        (BC, N, D), (H, W) = noise.shape, grid
        first = N * torch.arange(BC, device=noise.device)[:, None]                      # (B*C, 1)
        rows = (first + ids_keep).flatten()                                             # (B*C*V,)
        fill = noise.reshape(BC * N, D).to(tokens.dtype)                                # (B*C*N, D)
        x = fill.index_copy(0, rows, tokens.reshape(-1, D)).view(BC, H, W, D)           # (B*C, H, W, D)
        for conv in self.blocks:  # channels stay last in memory: conv and norm both read the tensor as it lies
            y = conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)                         # (B*C, H, W, D)
            x = x + recompute(lambda y: F.gelu(F.layer_norm(y, (D,))), y)
        return self.proj(x.reshape(BC, N, D))                                           # (B*C, N, D)


def ufo_loss(pred: Tensor, cls: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared errors of the utterance-frame objective (paper Sec. 3.2): (MSE_frame, MSE_utterance), fp32 scalars.

    pred (B*C, N, D) against targets (B, N, D) at the masked patches of mask (B*C, N); cls (B*C, D) against the clip's
    mean target. The targets are broadcast over the clones, not copied.
    """
    B, N, D = targets.shape
    pred = pred.float().view(B, -1, N, D)                                               # (B, C, N, D)
    frame = F.mse_loss(pred, targets[:, None].expand_as(pred), reduction="none").mean(-1)  # (B, C, N)
    mask = mask.view(B, -1, N).float()
    utterance = cls.float().view(B, -1, D) - targets.mean(1, keepdim=True)              # (B, C, D)
    return (frame * mask).sum() / mask.sum(), utterance.square().mean()


class EAT(nn.Module):
    """The student: encoder, decoder and the loss. The teacher is a second Encoder that the training loop owns."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def forward(
        self, spec: Tensor, mask: Tensor, ids_keep: Tensor, targets: Tensor, noise: Tensor, utterance_weight: float
    ) -> dict[str, Tensor]:
        """Loss of one batch: spec (B, 1, F, M), mask (B*C, N), ids_keep (B*C, V), targets (B, N, D), noise (B*C, N, D).

        loss = sqrt(D) * (MSE_frame + utterance_weight * MSE_utterance). The released code sums the utterance term over
        the rows of one GPU (EAT_pretraining.py:760-776), so that its lambda = 1 is a weight of 12 clips * 16 clones;
        written with means, the weight does not depend on how a batch is divided.

        Returns loss = loss_frame + loss_utterance (fp32 scalars) and pred (B*C, N, D), detached.
        """
        tokens = self.encoder(spec, ids_keep)                                           # (B*C, 1+V, D)
        pred = self.decoder(tokens[:, 1:], ids_keep, noise, self.config.grid(spec.shape[2]))  # (B*C, N, D)
        mse_frame, mse_utterance = ufo_loss(pred, tokens[:, 0], targets, mask)
        loss_frame = math.sqrt(self.config.width) * mse_frame
        loss_utterance = math.sqrt(self.config.width) * utterance_weight * mse_utterance
        return dict(
            loss=loss_frame + loss_utterance,
            loss_frame=loss_frame.detach(),
            loss_utterance=loss_utterance.detach(),
            pred=pred.detach(),
        )

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike) -> tuple["EAT", Encoder]:
        """Student and teacher of a pre-training checkpoint: (EAT, Encoder), in eval mode."""
        found = read_pretrained(path)
        if found.decoder is None or found.teacher is None:
            raise CheckpointError(f"{path} holds an encoder only, without the decoder and teacher of pre-training")
        weights = {f"encoder.{k}": v for k, v in found.encoder.items()}
        student = _load(cls(found.network), weights | {f"decoder.{k}": v for k, v in found.decoder.items()}, path)
        return student, _load(Encoder(found.network), found.teacher, path).requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# Classification


@dataclass(frozen=True)
class AudioInput:
    """How the audio was presented to a network; the defaults are AudioSet's, as released."""

    sample_rate: int = 16_000
    clip_frames: int = 1024  # of 10 ms
    norm_mean: float = -4.268  # of the log-mel values
    norm_std: float = 4.569  # likewise; values are divided by twice this


class AudioClassifier(nn.Module):
    """Encoder, LayerNorm and a linear head (paper Sec. 3.4; models/EAT_audio_classification.py:365-457).

    classes: what a manifest calls each class -> its name for people, in the order of the outputs.
    pooling: "cls" (the paper's choice) or "mean" of the patches.
    exclusive: a clip has exactly one class, so that probabilities are a softmax over classes, not a sigmoid of each.
    """

    def __init__(
        self, config: ModelConfig, classes: dict[str, str], pooling: str = "cls", exclusive: bool = False,
        audio: AudioInput | None = None, norm_eps: float = NORM_EPS,
    ):  # fmt: skip
        super().__init__()
        if pooling not in ("cls", "mean"):
            raise ValueError(f'pooling must be "cls" or "mean", not {pooling!r}')
        self.classes, self.pooling, self.exclusive = dict(classes), pooling, exclusive
        self.audio = audio or AudioInput()
        self.encoder = Encoder(config)
        self.fc_norm = nn.LayerNorm(config.width, eps=norm_eps)
        self.head = nn.Linear(config.width, len(classes))
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, spec: Tensor) -> Tensor:
        """(B, 1, F, M) -> logits (B, classes)."""
        tokens = self.encoder(spec)                                                     # (B, 1+N, D)
        pooled = tokens[:, 0] if self.pooling == "cls" else tokens[:, 1:].mean(1)       # (B, D)
        return self.head(self.fc_norm(pooled))                                          # (B, classes)

    def probabilities(self, logits: Tensor) -> Tensor:
        """What forward returns as probabilities, (B, classes)."""
        return logits.softmax(1) if self.exclusive else logits.sigmoid()

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike) -> "AudioClassifier":
        """The classifier of any fine-tuned checkpoint that read_pretrained knows, in eval mode."""
        found = read_pretrained(path)
        if found.head is None:
            raise CheckpointError(f"{path} is not fine-tuned: it has no classes (finetune.py --init {path} adds them)")
        model = cls(found.network, found.classes, found.pooling, found.exclusive, found.audio, found.norm_eps)
        return _load(model, {f"encoder.{k}": v for k, v in found.encoder.items()} | found.head, path)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: this project's, and both released layouts


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says why, in one line."""


# What released files hold beside tensors and plain values, in their settings: read as inert placeholders.
INERT_TYPES = (
    "argparse.Namespace", "numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
    "EAT.data.modality.Modality", "data2vec.data.modality.Modality", "examples.data2vec.data.modality.Modality",
)  # fmt: skip


class _Inert:
    """In the place of an object of one of INERT_TYPES: whatever it was made of is dropped."""

    def __new__(cls, *_):
        return super().__new__(cls)

    def __setstate__(self, _):
        pass


def load_checkpoint(path: str | os.PathLike) -> dict:
    """Read a file of tensors and plain values, on the CPU, without running anything in it.

    Raises CheckpointError if it is missing, damaged or holds more. torch.load does not compare the checksums that the
    file, a zip archive, has for each tensor; zipfile does.
    """
    try:
        with open(path, "rb"):  # for a plain message if that cannot be done
            pass
        if zipfile.is_zipfile(path):  # files older than torch 1.6 are not
            with zipfile.ZipFile(path) as archive:
                if (damaged := archive.testzip()) is not None:
                    raise CheckpointError(f"{path} is damaged: {damaged} does not match its checksum")
        with torch.serialization.safe_globals([(_Inert, name) for name in INERT_TYPES]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        what = f"holds {name[1]}" if name else "is damaged or holds"
        message = f"{path} {what}, more than tensors and plain values: refused, it may be malicious"
        raise CheckpointError(message) from None
    except Exception as error:  # whatever zipfile, pickle and torch make of bytes that are not theirs
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"cannot read {path}: {reason}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} is not a checkpoint: it holds a {type(state).__name__}")
    return state


@dataclass
class Pretrained:
    """What read_pretrained finds; state dicts by this project's names, fp32."""

    network: ModelConfig
    encoder: dict[str, Tensor]
    audio: AudioInput = AudioInput()
    decoder: dict[str, Tensor] | None = None  # pre-training only
    teacher: dict[str, Tensor] | None = None  # pre-training only: an encoder
    head: dict[str, Tensor] | None = None  # fine-tuned only: fc_norm and head
    classes: dict[str, str] = field(default_factory=dict)  # label -> name
    pooling: str = "cls"
    exclusive: bool = False  # one class a clip
    norm_eps: float = NORM_EPS  # of fc_norm


# This project's name of an encoder parameter or group, the released one, the Hugging Face one (behind "model.")
ENCODER_NAMES = (
    ("cls_token", "modality_encoders.IMAGE.extra_tokens", "extra_tokens"),
    ("patch_embed.", "modality_encoders.IMAGE.local_encoder.proj.", "local_encoder.proj."),
    ("norm_pre.", "modality_encoders.IMAGE.context_encoder.norm.", "pre_norm."),
    ("blocks.", "blocks.", "blocks."),
)
DECODER = "modality_encoders.IMAGE.decoder."
POSITIONS = ("modality_encoders.IMAGE.fixed_positional_encoder.positions", "fixed_positional_encoder.positions")
RELEASED_NORMS = {"esc50_eval": (-6.627, 5.359), "spcv2_eval": (-6.846, 5.565)}  # flags of its task settings


def rename(state: dict[str, Tensor], pairs: list[tuple[str, str]]) -> dict[str, Tensor]:
    """The entries of `state` that begin with the first of a pair, with the second in its place, as fp32."""
    return {
        new + name.removeprefix(old): value.float()
        for name, value in state.items()
        for old, new in pairs
        if name == old or (old.endswith(".") and name.startswith(old))
    }


def _refuse_unknown(weights: dict, known: tuple[str, ...]) -> None:
    for name in weights:
        if not name.startswith(known):
            raise ValueError(f"it holds {name}, which this model does not have")


def read_pretrained(path: str | os.PathLike) -> Pretrained:
    """Read a checkpoint of any of the known layouts; the sizes come from the file.

    A run folder of pretrain.py or finetune.py (its best.pt or else last.pt) or one of its files; a released fairseq
    file; a Hugging Face folder (config.json, model.safetensors). Raises CheckpointError if it is none of these.
    """
    path = Path(path)
    if path.is_dir() and not (path / "model.safetensors").exists():
        for name in ("best.pt", "last.pt"):
            if (path / name).exists():
                path = path / name
                break
        else:
            raise CheckpointError(f"no checkpoint in {path}: looked for model.safetensors, best.pt and last.pt")
    try:
        if path.is_dir() or path.suffix == ".safetensors":
            return _checked(_read_hugging_face(path / "model.safetensors" if path.is_dir() else path))
        state = load_checkpoint(path)
        if "network" in state:
            return _checked(_read_own(state))
        if isinstance(state.get("model"), dict) and isinstance(state.get("cfg"), dict):
            return _checked(_read_fairseq(state))
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        missing = f"no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise CheckpointError(f"{path} is not a checkpoint of this model: {missing}") from None
    raise CheckpointError(f"{path} is not a checkpoint of this model: it holds {', '.join(map(str, list(state)[:5]))}")


def _checked(found: Pretrained) -> Pretrained:
    """A stranger's file may claim anything: sizes must be those of its tensors, before memory is taken for them."""
    n, audio, head = found.network, found.audio, found.head
    shapes = {"patch_embed.weight": (n.width, 1, n.patch_size, n.patch_size)}
    shapes[f"blocks.{n.depth - 1}.mlp.fc1.weight"] = (n.mlp_ratio * n.width, n.width)
    decoder = {f"blocks.{n.decoder_depth - 1}.weight": (n.width, n.width // n.decoder_groups, *2 * [n.decoder_kernel])}
    for weights, expected in ((found.encoder, shapes), (found.decoder, decoder)):
        if weights and any(weights[name].shape != shape for name, shape in expected.items()):
            raise ValueError("its settings give other sizes than its tensors have")
    if n.mel_bins > 1024 or audio.clip_frames not in range(n.patch_size, (MAX_PATCH_ROWS + 1) * n.patch_size):
        raise ValueError(f"it claims {n.mel_bins} mel bins, clips of {audio.clip_frames} frames")
    if not all(math.isfinite(x) for x in (audio.norm_mean, audio.norm_std, found.norm_eps)) or audio.norm_std <= 0:
        raise ValueError("its normalisation is not made of numbers")
    names = [*found.classes, *found.classes.values()]
    if found.pooling not in ("cls", "mean"):
        raise ValueError(f"it pools by {found.pooling!r}")
    if head and (len(found.classes) != len(head["head.bias"]) or not all(isinstance(name, str) for name in names)):
        raise ValueError(f"it names {len(found.classes)} classes, its head has {len(head['head.bias'])}")
    for weights in filter(None, (found.encoder, found.decoder, found.teacher, head)):
        if not all(w.isfinite().all() for w in weights.values()):
            raise ValueError("its weights are not finite, its training has diverged")
    return found


def _read_own(state: dict) -> Pretrained:
    network, config = ModelConfig(**state["network"]), state["config"]
    audio = AudioInput(clip_frames=config["clip_frames"], norm_mean=config["norm_mean"], norm_std=config["norm_std"])
    weights = state["student"] if "student" in state else state["classifier"]
    found = Pretrained(network, rename(weights, [("encoder.", "")]), audio)
    if "student" in state:
        found.decoder, found.teacher = rename(weights, [("decoder.", "")]), dict(state["teacher"])
    else:
        found.head = rename(weights, [("fc_norm.", "fc_norm."), ("head.", "head.")])
        found.classes, found.pooling, found.norm_eps = dict(state["classes"]), config["pooling"], state["norm_eps"]
        found.exclusive = config["loss"] == "ce"
    return found


def _read_fairseq(state: dict) -> Pretrained:
    cfg, weights = state["cfg"], state["model"]
    is_tuned = "head.weight" in weights
    model_cfg = cfg["model"]["pretrained_model_args"]["model"] if is_tuned else cfg["model"]
    if model_cfg.get("layer_norm_first"):
        raise ValueError("its blocks normalise first, these do so last")
    prefix = "model." if is_tuned else ""
    names = [(released, ours) for ours, released, _ in ENCODER_NAMES]
    known = (prefix + POSITIONS[0], prefix + DECODER, "_ema", "fc_norm.", "head.")
    _refuse_unknown(weights, known + tuple(prefix + released for released, _ in names))
    encoder = rename(weights, [(prefix + released, ours) for released, ours in names])
    decoder = {k.replace(".0.", "."): v for k, v in rename(weights, [(DECODER, "")]).items()} or None
    sizes = model_cfg["modalities"]["image"]["decoder"]
    network = _network_of(
        encoder, model_cfg["num_heads"], decoder_depth=sizes["decoder_layers"],
        decoder_kernel=sizes["decoder_kernel"], decoder_groups=sizes["decoder_groups"],
    )  # fmt: skip
    _check_positions(weights[prefix + POSITIONS[0]], network)
    flags = cfg.get("task") or {}
    norm = next((norm for flag, norm in RELEASED_NORMS.items() if flags.get(flag)), None)
    frames = cfg["model"]["target_length"] if is_tuned else model_cfg["modalities"]["image"]["target_length"]
    audio = AudioInput(clip_frames=frames, **(dict(zip(("norm_mean", "norm_std"), norm)) if norm else {}))
    audio = replace(audio, **(state.get("audio") or {}))  # ours, when export wrote the file
    found = Pretrained(network, encoder, audio, decoder)
    if "_ema" in weights:
        found.teacher = rename(weights["_ema"], names)
    if is_tuned:
        found.head = rename(weights, [("fc_norm.", "fc_norm."), ("head.", "head.")])
        labels = (state.get("task_state") or {}).get("labels") or {}
        ordered = sorted(labels, key=lambda label: int(labels[label]))
        found.classes = state.get("classes") or _classes(ordered, len(found.head["head.bias"]))
        found.exclusive = state.get("exclusive", bool(flags.get("esc50_eval")))
        found.norm_eps = state.get("norm_eps", NORM_EPS)
        found.pooling = "mean" if cfg["model"].get("prediction_mode") == "MEAN_POOLING" else "cls"
    return found


def _read_hugging_face(path: Path) -> Pretrained:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise CheckpointError("Hugging Face folders need the package safetensors: pip install safetensors") from None
    try:
        config = json.loads(path.with_name("config.json").read_text())
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}
            extra = json.loads((file.metadata() or {}).get("eat", "{}"))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {str(error).splitlines()[0]}") from None
    if config.get("layer_norm_first") or config.get("norm_eps", NORM_EPS) != NORM_EPS:
        raise ValueError("its blocks are not those of the published models (layer_norm_first, norm_eps)")
    known = ("model." + POSITIONS[1], "model.fc_norm.", "model.head.")
    _refuse_unknown(weights, known + tuple(f"model.{theirs}" for *_, theirs in ENCODER_NAMES))
    encoder = rename(weights, [("model." + theirs, ours) for ours, _, theirs in ENCODER_NAMES])
    network = _network_of(encoder, config["num_heads"], mel_bins=config["mel_bins"])
    _check_positions(weights["model." + POSITIONS[1]], network)
    audio = dict(clip_frames=config["img_size"][0]) | extra.get("audio", {})
    found = Pretrained(network, encoder, AudioInput(**audio))
    if "model.head.weight" in weights:
        found.head = rename(weights, [("model.fc_norm.", "fc_norm."), ("model.head.", "head.")])
        found.classes = extra.get("classes") or _classes([], len(found.head["head.bias"]))
        found.exclusive = extra.get("exclusive", False)
        found.norm_eps = extra.get("norm_eps", 1e-5)  # the published code builds this one norm with PyTorch's default
    return found


def _network_of(encoder: dict[str, Tensor], heads: int, **others: int) -> ModelConfig:
    """Sizes of a network from its tensors; the number of heads is not among them."""
    width, patch_size = encoder["cls_token"].shape[-1], encoder["patch_embed.weight"].shape[-1]
    depth = len({name.split(".")[1] for name in encoder if name.startswith("blocks.")})
    mlp_ratio = encoder["blocks.0.mlp.fc1.weight"].shape[0] // width
    return ModelConfig(patch_size, width=width, depth=depth, heads=heads, mlp_ratio=mlp_ratio, **others)


def _check_positions(table: Tensor, network: ModelConfig) -> None:
    """The positions in a file must be the fixed ones, which are computed here; half precision is near enough."""
    ours = sincos_2d(MAX_PATCH_ROWS, network.mel_bins // network.patch_size, network.width)
    rows = table.shape[1]
    if rows > len(ours) or not torch.allclose(table[0].float(), ours[:rows], rtol=0, atol=2e-3):
        raise ValueError("its positions are not the fixed sines and cosines")


def _classes(labels: list[str], n_classes: int) -> dict[str, str]:
    labels = labels if len(labels) == n_classes else [f"class {i}" for i in range(n_classes)]
    return {label: label for label in labels}


def _load(model: nn.Module, weights: dict[str, Tensor], path: str | os.PathLike) -> nn.Module:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).splitlines()[1:3]).strip()
        raise CheckpointError(f"{path} is a checkpoint of another model: {reason}") from None
    return model.eval()


def export(checkpoint: str | os.PathLike, folder: str | os.PathLike) -> None:
    """Write a checkpoint in the released layouts: config.json and model.safetensors for the published `AutoModel` code,
    fairseq.pt for tools that read the released files.

    The Hugging Face layout has no decoder and no teacher. Raises CheckpointError if the folder is not empty, if a
    checkpoint cannot be read, or if its classifier pools by the mean, which the published Hugging Face code cannot.
    """
    found, folder = read_pretrained(checkpoint), Path(folder)
    if found.pooling != "cls":
        raise CheckpointError(f"{checkpoint} pools by the mean: the published code knows CLS only")
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise CheckpointError("export needs the package safetensors: pip install safetensors") from None
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} is not an empty folder: choose another")
    folder.mkdir(parents=True, exist_ok=True)
    network, head = found.network, found.head or {}
    positions = sincos_2d(MAX_PATCH_ROWS, network.mel_bins // network.patch_size, network.width)[None].contiguous()
    ours = dict(audio=asdict(found.audio), classes=found.classes, exclusive=found.exclusive, norm_eps=found.norm_eps)

    tensors = rename(found.encoder, [(name, theirs) for name, _, theirs in ENCODER_NAMES])
    tensors |= {POSITIONS[1]: positions} | head
    tensors = {f"model.{name}": value.contiguous() for name, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata=dict(format="pt", eat=json.dumps(ours)))
    config = _hugging_face_config(found)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")

    names = [(name, released) for name, released, _ in ENCODER_NAMES]
    prefix = "model." if head else ""
    weights = rename(found.encoder, names) | {POSITIONS[0]: positions}
    weights = {prefix + name: value for name, value in weights.items()} | head
    for name, value in (found.decoder or {}).items():
        weights[DECODER + re.sub(r"(blocks\.\d+)\.", r"\1.0.", name)] = value
    if found.teacher:
        weights["_ema"] = rename(found.teacher, names) | {POSITIONS[0]: positions}
    state = dict(
        args=None, cfg=_fairseq_settings(found), model=weights, criterion=None, optimizer_history=[],
        task_state=dict(labels={label: str(i) for i, label in enumerate(found.classes)}) if head else {},
        extra_state={}, last_optimizer_state=None, **ours,
    )  # fmt: skip
    torch.save(state, folder / "fairseq.pt")


def _hugging_face_config(found: Pretrained) -> dict:
    """The fields of the published config.json, in their order."""
    n = found.network
    return dict(
        model_type="eat", architectures=["EATModel"], embed_dim=n.width, depth=n.depth, num_heads=n.heads,
        patch_size=n.patch_size, stride=n.patch_size, in_chans=1, mel_bins=n.mel_bins, max_length=MAX_PATCH_ROWS,
        num_classes=len(found.classes) or 527, model_variant="finetune" if found.head else "pretrain",
        mlp_ratio=float(n.mlp_ratio), qkv_bias=True, drop_rate=0.0, attn_drop_rate=0.0, activation_dropout=0.0,
        post_mlp_drop=0.0, start_drop_path_rate=0.0, end_drop_path_rate=0.0, layer_norm_first=False, norm_eps=NORM_EPS,
        norm_affine=True, fixed_positions=True, img_size=[found.audio.clip_frames, n.mel_bins],
    )  # fmt: skip


def _fairseq_settings(found: Pretrained) -> dict:
    """The settings that the released code needs to build the network; it fills in the others."""
    n, frames = found.network, found.audio.clip_frames
    decoder = dict(
        decoder_dim=n.width, decoder_groups=n.decoder_groups, decoder_kernel=n.decoder_kernel,
        decoder_layers=n.decoder_depth, input_dropout=0.0, decoder_residual=True, projection_layers=1,
    )  # fmt: skip
    image = dict(
        type="IMAGE", prenet_depth=0, num_extra_tokens=1, init_extra_token_zero=False, inverse_mask=True,
        model_depth=n.depth, decoder=decoder, in_chans=1, patch_size=n.patch_size, embed_dim=n.width,
        fixed_positions=True, target_length=frames, max_length=MAX_PATCH_ROWS,
    )  # fmt: skip
    model = dict(
        _name="data2vec_multi", depth=n.depth, num_heads=n.heads, embed_dim=n.width, mlp_ratio=float(n.mlp_ratio),
        norm_eps=NORM_EPS, norm_affine=True, layer_norm_first=False, modalities=dict(image=image),
        supported_modality="IMAGE", average_top_k_layers=n.depth,
    )  # fmt: skip
    norm = (found.audio.norm_mean, found.audio.norm_std)
    task = dict(
        _name="mae_image_pretraining", data=".", key="source", audio_mae=True, downsr_16hz=True, target_length=frames,
        **{flag: norm == theirs for flag, theirs in RELEASED_NORMS.items()},
    )  # fmt: skip
    if found.head is None:
        return dict(model=model, task=task)
    tuned = dict(
        _name="mae_image_classification", num_classes=len(found.classes), prediction_mode="CLS_TOKEN", audio_mae=True,
        target_length=frames, use_fc_norm=True, pretrained_model_args=dict(model=model, task=task),
    )  # fmt: skip
    return dict(model=tuned, task=dict(task, _name="mae_image_classification", key="imgs"))


# ---------------------------------------------------------------------------------------------------------------------


def describe() -> None:
    """Print the sizes of the networks and the shape of every stage for a clip of 10 s."""
    for name, config in MODELS.items():
        with torch.device("meta"):  # shapes only, no memory
            eat = EAT(config)
        encoder, decoder = (sum(p.numel() for p in part.parameters()) for part in (eat.encoder, eat.decoder))
        print(f"{name:6s} {encoder + decoder:>12,} trainable parameters: encoder {encoder:,}, decoder {decoder:,}")

    eat, spec = EAT(MODELS["base"]).eval(), torch.zeros(1, 1, 1024, 128)
    ids_keep = torch.arange(102).expand(16, -1)
    with torch.no_grad():
        tokens = eat.encoder(spec, ids_keep)
        pred = eat.decoder(tokens[:, 1:], ids_keep, torch.zeros(16, 512, 768), eat.config.grid(1024))
        targets = make_targets(eat.encoder.ffn_outputs(spec))
    for stage, tensor in (
        ("spectrogram (10.24 s)", spec),
        ("all patches, embedded", eat.encoder.embed(spec)),
        ("teacher's targets", targets),
        ("visible tokens, 16 clones", tokens),
        ("predictions", pred),
    ):
        print(f"{stage:26s} {tuple(tensor.shape)}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Without a command: print sizes and shapes.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command")
    command = commands.add_parser("export", help="write a checkpoint in the released layouts")
    command.add_argument("checkpoint", help="run folder, .pt file or Hugging Face folder")
    command.add_argument("folder", help="new folder for config.json, model.safetensors and fairseq.pt")
    args = parser.parse_args()
    if args.command is None:
        return describe()
    try:
        export(args.checkpoint, args.folder)
    except (CheckpointError, OSError) as error:
        sys.exit(f"model.py: {error}")
    print(f"{args.folder}: config.json and model.safetensors (Hugging Face), fairseq.pt")


if __name__ == "__main__":
    main()
