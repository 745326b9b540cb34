"""The EAT model: spectrogram in, tokens or loss out (EAT paper, arXiv 2401.03497, Sec. 3).

A student sees a few visible patches of a spectrogram and predicts what a teacher, an exponential moving
average (EMA) of the student, computes from all of it: for each masked patch its features (frame loss), and
with its CLS token their mean over the clip (utterance loss).

    Encoder           spectrogram -> tokens: a ViT with post-norm blocks; the class to copy for features
    make_targets      the teacher's feed-forward outputs -> what the student must predict
    Decoder           visible tokens -> a prediction for every patch: a small CNN
    EAT               student encoder + decoder -> the two losses (UFO: utterance-frame objective)
    AudioClassifier   encoder -> CLS token -> a score for each class

`from_pretrained` reads this project's run folders and .pt files and, with extras/released.py, released ones.
This file needs torch only and can be copied alone. `python model.py` prints sizes.
Citations such as models/mae.py:404 point into the released code (github.com/cwx-worst-one/EAT at 06c1c34).

Shapes:
    B  clips                             H, W  patches in time and frequency: 64 x 8 for 10 s
    C  masked copies (clones) of a clip  N     patches of a clip: H * W = 512
    F  frames of 10 ms: 1024             V     visible patches: 102
    M  mel bins: 128                     D     width: 768
    T  tokens: CLS and patches           L     blocks: 12
Rows of a (B*C, ...) tensor are clone-minor: row b * C + c is copy c of clip b.
"""

import contextlib
import errno
import math
import os
import re
import runpy
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6  # of the encoder's LayerNorms; target and decoder norms use PyTorch's 1e-5
MAX_PATCH_ROWS = 768  # longest input in patches of 16 frames: 768 * 0.16 s = 2 minutes


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the network, and how audio is presented to it; the defaults are EAT-base's, as released."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: int = 4
    drop_path: float = 0.0  # rate of the last block, rising linearly from 0 at the first
    decoder_depth: int = 6
    decoder_kernel: int = 3
    decoder_groups: int = 16
    patch_size: int = 16
    mel_bins: int = 128
    clip_frames: int = 1024  # of 10 ms
    norm_mean: float = -4.268  # of the log-mel values (AudioSet)
    norm_std: float = 4.569  # likewise; values are divided by twice this

    def __post_init__(self):
        P, sizes = max(1, self.patch_size), [getattr(self, f.name) for f in fields(self) if f.type is int]
        for holds, rule in (
            (P <= self.clip_frames < P * (MAX_PATCH_ROWS + 1), f"{P} to {P * MAX_PATCH_ROWS} clip_frames"),
            (all(type(n) is int and 0 < n <= 2**14 for n in sizes) and self.depth <= 256, "sizes that fit"),
            (self.width % max(1, self.heads) == self.width % 4 == 0, "a width that divides by heads and 4"),
            (self.width % max(1, self.decoder_groups) == 0, "a width that divides by decoder_groups"),
            (self.mel_bins % P == 0 and self.mel_bins <= 32 * P, f"mel bins in at most 32 patches of {P}"),
            (self.decoder_kernel % 2 == 1, "an odd decoder_kernel"),
            (0 <= self.drop_path < 1, "a drop_path from 0 to below 1"),
            (abs(self.norm_mean) < math.inf and 0 < self.norm_std < math.inf, "a finite mean and std"),
        ):
            if not holds:
                raise ValueError(f"expected {rule}: {self}")

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


# ----- Encoder ---------------------------------------------------------------------------------------------


def sincos_2d(rows: int, cols: int, width: int) -> Tensor:
    """Fixed positions of a rows x cols (time x frequency) grid, time-major: (rows * cols, width).
    Channels: [sin f | cos f | sin t | cos t], a quarter of the width each. The paper (Sec. 3.1) says 1-D
    positions; the released weights were trained with these (models/images.py:109-125)."""
    omega = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float32) / (width // 4))  # (D/4,)
    t, f = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")           # (rows, cols)
    f_angle, t_angle = (axis.reshape(-1, 1) * omega for axis in (f, t))                    # (rows*cols, D/4)
    return torch.cat([f_angle.sin(), f_angle.cos(), t_angle.sin(), t_angle.cos()], dim=1)  # (rows*cols, D)


class LayerNorm(nn.LayerNorm):
    """Returns the type of x, with statistics in fp32; under autocast alone, its output would be fp32."""

    def forward(self, x: Tensor) -> Tensor:
        affine = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, *affine, self.eps)


class Attention(nn.Module):
    """Multi-head self-attention with a fused qkv projection; (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, D // self.heads)  # (B, T, 3, heads, D/heads)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))    # 3 x (B, heads, T, D/heads)
        x = F.scaled_dot_product_attention(q, k, v)                   # (B, heads, T, D/heads)
        return self.proj(x.transpose(1, 2).reshape(B, T, D))          # (B, T, D)


class MLP(nn.Module):
    """Feed-forward network of a block; (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def drop_path(x: Tensor, rate: float) -> Tensor:
    """Leave a residual branch out for a part `rate` of the clips: (B, T, D) -> (B, T, D)."""
    return x * x.new_empty(len(x), 1, 1).bernoulli_(1 - rate).div_(1 - rate) if rate > 0 else x


class Block(nn.Module):
    """Post-norm transformer block: each residual sum is normalised (models/modules.py:259-324).
    Returns the new tokens and the bare output of the feed-forward network, of which the targets are made."""

    def __init__(self, config: ModelConfig, drop_path: float = 0.0):
        super().__init__()
        self.attn = Attention(config.width, config.heads)
        self.norm1 = LayerNorm(config.width, eps=NORM_EPS)
        self.mlp = MLP(config.width, config.mlp_ratio * config.width)
        self.norm2 = LayerNorm(config.width, eps=NORM_EPS)
        self.drop_path = drop_path  # in training only

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rate = self.drop_path if self.training else 0.0
        x = self.norm1(x + drop_path(self.attn(x), rate))
        ffn = self.mlp(x)
        return self.norm2(x + drop_path(ffn, rate)), ffn


class Encoder(nn.Module):
    """Vision transformer over patches: spec (B, 1, F, M) -> tokens (B, 1+N, D), the CLS token first."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        D, P = config.width, config.patch_size
        self.patch_embed = nn.Conv2d(1, D, kernel_size=P, stride=P)
        self.cls_token = nn.Parameter(torch.empty(1, 1, D))
        with torch.device("cpu"):  # computed, not loaded: `rebuild` makes the rest on "meta"
            pos_embed = sincos_2d(MAX_PATCH_ROWS, config.mel_bins // P, D)  # (768*W, D)
        self.register_buffer("pos_embed", pos_embed, persistent=False)
        self.norm_pre = nn.LayerNorm(D, eps=NORM_EPS)
        rates = [config.drop_path * i / max(1, config.depth - 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList([Block(config, rate) for rate in rates])
        self.init_weights()

    def init_weights(self) -> None:
        """As the released code (EAT_pretraining.py:243-251); what is not listed stays as PyTorch makes it."""
        nn.init.xavier_uniform_(self.patch_embed.weight.view(self.config.width, -1))
        nn.init.normal_(self.cls_token, std=1.0)  # not the usual 0.02
        for layer in self.blocks.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def embed(self, spec: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Patches with positions, the visible ones if ids_keep (B*C, V) is given, behind the CLS token.
        (B, 1, F, M) -> (B, 1+N, D) or (B*C, 1+V, D). Each clip is cut into patches once, whatever C is;
        frames that do not fill one are left out. Raises ValueError for another shape, or for too many frames.
        """
        if spec.ndim != 4 or spec.shape[1] != 1 or spec.shape[3] != self.config.mel_bins:
            raise ValueError(f"expected (B, 1, F, {self.config.mel_bins}), got {tuple(spec.shape)}")
        if not 1 <= self.config.grid(spec.shape[2])[0] <= MAX_PATCH_ROWS:
            raise ValueError(f"{spec.shape[2]} frames are not 1 to {MAX_PATCH_ROWS} patches")
        x = self.patch_embed(spec).flatten(2).transpose(1, 2)             # (B, N, D)
        dtype, x = x.dtype, x + self.pos_embed[: x.shape[1]]  # in autocast: its type; fp32 up to the norm
        if ids_keep is not None:
            B, N, D = x.shape
            first = N * torch.arange(B, device=x.device)[:, None]         # (B, 1)
            rows = (first + ids_keep.reshape(B, -1)).flatten()            # (B*C*V,)
            x = x.reshape(B * N, D).index_select(0, rows).view(*ids_keep.shape, D)  # (B*C, V, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, 1+N, D) or (B*C, 1+V, D)
        return self.norm_pre(x).to(dtype)

    def forward(self, spec: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Encode all patches or the visible ones: (B, 1, F, M) -> (B, 1+N, D) or (B*C, 1+V, D), CLS first."""
        x = self.embed(spec, ids_keep)
        for block in self.blocks:
            x, _ = block(x)
        return x

    def ffn_outputs(self, spec: Tensor) -> list[Tensor]:
        """Feed-forward output of every block for all patches, without CLS: L x (B, N, D)."""
        x, outputs = self.embed(spec), []
        for block in self.blocks:
            x, ffn = block(x)
            outputs.append(ffn[:, 1:])
        return outputs

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, teacher: bool = False) -> "Encoder":
        """The encoder of any checkpoint that read_pretrained knows, in eval mode. Raises CheckpointError.
        Of a pre-training run it is the student, as the released code uses it, or with `teacher` its EMA."""
        state = read_pretrained(path)
        if teacher and not state.get("teacher"):
            raise CheckpointError(f"{path} has no teacher: it is not a pre-training checkpoint")
        part = "teacher" if teacher else "student" if "student" in state else "classifier"
        return rebuild(cls, state, part, "" if teacher else "encoder.")


# ----- Pre-training: targets, decoder, loss ----------------------------------------------------------------


def make_targets(ffn_outputs: list[Tensor]) -> Tensor:
    """Average blocks' outputs into targets: L x (B, N, D) -> (B, N, D), fp32 (EAT_pretraining.py:785-828).
    Each block is first normalised per clip and channel over its patches, so that no block dominates and no
    constant offset can be predicted; the average is then normalised over channels. The paper (Sec. 3.2) says
    "outputs of all layers"; in the released code they are those of the feed-forward networks, before residual
    and norm."""
    normed = [F.instance_norm(y.float().transpose(1, 2)) for y in ffn_outputs]  # L x (B, D, N)
    mean = (sum(normed) / len(normed)).transpose(1, 2)                          # (B, N, D)
    return F.layer_norm(mean, mean.shape[2:])


class Decoder(nn.Module):
    """CNN that predicts every patch from the visible ones (paper Sec. 3.3; models/modules.py:182-230).
    Released code beyond the paper: grouped convolutions, a residual around each layer, norms without affine,
    a final linear layer, and small noise instead of a learned mask token; positions are implied by the grid.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, kernel, groups = config.width, config.decoder_kernel, config.decoder_groups
        conv = dict(kernel_size=kernel, padding=kernel // 2, groups=groups)
        self.blocks = nn.ModuleList(nn.Conv2d(D, D, **conv) for _ in range(config.decoder_depth))
        self.norm = LayerNorm(D, elementwise_affine=False)
        self.proj = nn.Linear(D, D)

    def forward(self, tokens: Tensor, ids_keep: Tensor, noise: Tensor, grid: tuple[int, int]) -> Tensor:
        """tokens (B*C, V, D) in their places among `noise` (B*C, N, D) -> (B*C, N, D)."""
        (BC, N, D), (H, W) = noise.shape, grid
        first = N * torch.arange(BC, device=noise.device)[:, None]             # (B*C, 1)
        rows = (first + ids_keep).flatten()                                    # (B*C*V,)
        fill = noise.reshape(BC * N, D).to(tokens.dtype)                       # (B*C*N, D)
        x = fill.index_copy(0, rows, tokens.reshape(-1, D)).view(BC, H, W, D)  # (B*C, H, W, D)
        for conv in self.blocks:  # channels stay last in memory: conv and norm read the tensor as it lies
            y = conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)                # (B*C, H, W, D)
            x = x + F.gelu(self.norm(y))
        return self.proj(x.reshape(BC, N, D))                                  # (B*C, N, D)


def ufo_loss(pred: Tensor, cls: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Utterance-frame objective (paper Sec. 3.2): (MSE_frame, MSE_utterance), fp32 scalars.
    pred (B*C, N, D) against targets (B, N, D) at the masked patches of mask (B*C, N); cls (B*C, D) against
    the clip's mean target. The targets are broadcast over the clones, not copied."""
    B, N, D = targets.shape
    pred = pred.float().view(B, -1, N, D)                                                  # (B, C, N, D)
    frame = F.mse_loss(pred, targets[:, None].expand_as(pred), reduction="none").mean(-1)  # (B, C, N)
    mask = mask.view(B, -1, N).float()
    utterance = cls.float().view(B, -1, D) - targets.mean(1, keepdim=True)                 # (B, C, D)
    return (frame * mask).sum() / mask.sum(), utterance.square().mean()


class EAT(nn.Module):
    """The student: encoder, decoder, loss. The teacher is another Encoder, owned by the training loop."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def forward(
        self, spec: Tensor, mask: Tensor, ids_keep: Tensor, targets: Tensor, noise: Tensor,
        utterance_weight: float,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Loss of one batch: spec (B, 1, F, M), mask (B*C, N), ids_keep (B*C, V), targets (B, N, D),
        noise (B*C, N, D) -> loss = loss_frame + loss_utterance (fp32 scalars) and pred (B*C, N, D), detached.

        loss = sqrt(D) * (MSE_frame + utterance_weight * MSE_utterance). The released code sums the utterance
        term over the rows of one GPU (EAT_pretraining.py:760-776), so that its lambda = 1 is a weight of 12
        clips * 16 clones; written with means, the weight does not depend on how a batch is divided."""
        tokens = self.encoder(spec, ids_keep)                                                 # (B*C, 1+V, D)
        pred = self.decoder(tokens[:, 1:], ids_keep, noise, self.config.grid(spec.shape[2]))  # (B*C, N, D)
        mse_frame, mse_utterance = ufo_loss(pred, tokens[:, 0], targets, mask)
        loss_frame = math.sqrt(self.config.width) * mse_frame
        loss_utterance = math.sqrt(self.config.width) * utterance_weight * mse_utterance
        parts = dict(loss_frame=loss_frame, loss_utterance=loss_utterance, pred=pred)
        return dict(loss=loss_frame + loss_utterance) | {name: part.detach() for name, part in parts.items()}

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike) -> tuple["EAT", Encoder]:
        """Student and teacher of a pre-training checkpoint, in eval mode. Raises CheckpointError."""
        state = read_pretrained(path)
        if not state.get("teacher"):
            raise CheckpointError(f"{path} holds an encoder only, without decoder and teacher")
        return rebuild(cls, state, "student"), rebuild(Encoder, state, "teacher")


# ----- Classification --------------------------------------------------------------------------------------


class AudioClassifier(nn.Module):
    """Encoder, LayerNorm and a linear head (paper Sec. 3.4; models/EAT_audio_classification.py:365-457).
    classes: what a manifest calls each class -> its name for people, in the order of the outputs.
    pooling: "cls" (the paper's choice), "mean" of the patches, or "bands": that over time, of each band.
    exclusive: a clip has exactly one class, so that probabilities are a softmax, not a sigmoid of each."""

    def __init__(
        self, config: ModelConfig, classes: dict[str, str], pooling: str = "cls", exclusive: bool = False,
        norm_eps: float = NORM_EPS,
    ):  # fmt: skip
        super().__init__()
        are_names = all(isinstance(name, str) for name in (*classes, *classes.values()))
        if pooling not in ("cls", "mean", "bands") or not are_names or not 0 <= norm_eps < math.inf:
            raise ValueError(f"expected names, an eps, pooling cls, mean or bands: {norm_eps}, {pooling!r}")
        self.head_settings = dict(classes=classes, pooling=pooling, exclusive=exclusive, norm_eps=norm_eps)
        self.config, self.classes, self.pooling, self.exclusive = config, dict(classes), pooling, exclusive
        self.encoder = Encoder(config)
        width = config.width * (config.mel_bins // config.patch_size if pooling == "bands" else 1)
        self.fc_norm = LayerNorm(width, eps=norm_eps)
        self.head = nn.Linear(width, len(classes))
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, spec: Tensor) -> Tensor:
        """(B, 1, F, M) -> logits (B, classes)."""
        tokens = self.encoder(spec)                                                # (B, 1+N, D)
        pooled = tokens[:, 0] if self.pooling == "cls" else tokens[:, 1:].mean(1)  # (B, D)
        if self.pooling == "bands":
            patches = tokens[:, 1:].unflatten(1, self.config.grid(spec.shape[2]))  # (B, H, W, D)
            pooled = patches.mean(1).flatten(1)                                    # (B, W*D)
        return self.head(self.fc_norm(pooled))                                     # (B, classes)

    def probabilities(self, logits: Tensor) -> Tensor:
        """What forward returns as probabilities, (B, classes)."""
        return logits.softmax(1) if self.exclusive else logits.sigmoid()

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike) -> "AudioClassifier":
        """The classifier of any fine-tuned checkpoint, in eval mode. Raises CheckpointError."""
        state = read_pretrained(path)
        if "classifier" not in state:
            raise CheckpointError(f"{path} is not fine-tuned, it has no classes: finetune.py adds them")
        return rebuild(cls, state, "classifier")


# ----- Checkpoints -----------------------------------------------------------------------------------------
# Dicts of tensors and plain values. `network` has a ModelConfig's fields; the weights are those of `student`
# (an EAT) and `teacher` (an Encoder), or of a `classifier`, whose other arguments are in `head`.


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says why, in one line."""


def save_checkpoint(path: Path, **state) -> Path:
    """Write a checkpoint, whole or not at all; returns its path. The old last.pt becomes previous.pt."""
    partial = path.with_suffix(".tmp")
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if path.name == "last.pt" and path.exists():
            os.replace(path, path.with_name("previous.pt"))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def refusing(path: str | os.PathLike) -> Iterator[None]:
    """Inside, what a damaged or foreign file makes Python raise becomes a CheckpointError of one line.
    What keeps a file from being read now, as memory or a permission, is no damage: an OSError stays one."""
    try:
        yield
    except Exception as error:  # whatever zipfile, pickle and torch make of a stranger's bytes
        reason = " ".join(str(error).replace("\t", "").split("\n")[:2])[:300].strip() or type(error).__name__
        if "weights_only" in reason:  # pickled code, or nonsense: torch.load runs none of it
            code = re.search(r"GLOBAL (\S+)", str(error))
            reason = f"it holds {code[1] if code else 'more than tensors'}, which may be malicious"
        if isinstance(error, MemoryError) or "allocate memory" in reason:
            error = OSError(errno.ENOMEM, "not enough memory", str(path))
        of_damage = (errno.ENOENT, errno.EINVAL)  # which wrong offsets in a file lead to
        if isinstance(error, CheckpointError) or getattr(error, "errno", of_damage[0]) not in of_damage:
            raise error from None
        raise CheckpointError(f"{path} is not a checkpoint of this model: {reason}") from None


def load_checkpoint(path: str | os.PathLike) -> dict:
    """Read a file of tensors and plain values, on the CPU, without running anything in it.
    Raises CheckpointError if it is missing, damaged or holds more. torch.load compares no checksums: zipfile
    does. Raises OSError if it cannot be read now, which says nothing of what it holds."""
    if not os.path.isfile(path):
        raise CheckpointError(f"there is no file {path}")
    with refusing(path):
        if zipfile.is_zipfile(path) and (damaged := zipfile.ZipFile(path).testzip()):
            raise ValueError(f"{damaged} does not match its checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
    return state


def newest_checkpoint(folder: Path) -> Path | None:
    """last.pt, or previous.pt where that is damaged and so put aside; None if there never was one."""
    for path in filter(Path.exists, (folder / "last.pt", folder / "previous.pt")):
        try:
            load_checkpoint(path)
            return path
        except CheckpointError as error:
            print(f"WARNING: {error}; it is now called {path.stem}.damaged", file=sys.stderr)
            path.rename(path.with_suffix(".damaged"))
    if any(folder.glob("*.damaged")):
        raise CheckpointError(f"no checkpoint in {folder} can be read: restore one or choose another folder")
    return None


def read_pretrained(path: str | os.PathLike) -> dict:
    """What a checkpoint holds: `network`, `student` and `teacher` or `classifier` and `head`; and its `path`.
    A run folder (its best.pt or else last.pt) or a .pt file; extras/released.py reads what is not of this
    project: released fairseq files and Hugging Face folders. Raises CheckpointError."""
    candidates = [os.path.join(path, name) for name in ("best.pt", "last.pt")]
    path = next(filter(os.path.isfile, candidates), os.fspath(path))
    state = {}
    if os.path.isfile(path):
        try:
            state = load_checkpoint(path)
        except CheckpointError as error:
            if "malicious" not in str(error):  # as of released files, whose settings are pickled objects
                raise
    if "network" not in state:
        reader = Path(__file__).resolve().parent / "extras" / "released.py"
        if not reader.exists():
            raise CheckpointError(f"{path} is not of this project, and there is no {reader} to read it")
        state = runpy.run_path(str(reader))["read_released"](path, state)
    return state | dict(path=path)


def rebuild(cls: type[nn.Module], state: dict, part: str, prefix: str = "") -> nn.Module:
    """The network that a checkpoint's `part` holds, behind `prefix`, in eval mode; or CheckpointError."""
    with refusing(state["path"]):
        weights = {k.removeprefix(prefix): v for k, v in state[part].items() if k.startswith(prefix)}
        settings = state["head"] if part == "classifier" and not prefix else {}
        config = ModelConfig(**state["network"])
        if not any(k.endswith("cls_token") and v.shape[-1] == config.width for k, v in weights.items()):
            raise ValueError("its tensors are not as wide as it claims")
        with torch.device("meta"):  # claimed sizes take no memory before tensors confirm them
            model = cls(config, **settings)
        half = torch.float16, torch.bfloat16
        weights = {name: w.float() if w.dtype in half else w for name, w in weights.items()}
        model.load_state_dict(weights, assign=True)
        if not all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters()):
            raise ValueError("its weights are not finite: its training has diverged")
    return model.eval()


if __name__ == "__main__":
    for name, config in MODELS.items():
        with torch.device("meta"):  # no memory, no arithmetic
            eat = EAT(config)
        encoder, decoder = (sum(p.numel() for p in part.parameters()) for part in (eat.encoder, eat.decoder))
        print(f"{name:6s} {encoder + decoder:>12,} parameters: encoder {encoder:,}, decoder {decoder:,}")
