"""The EAT model: spectrogram in, tokens or loss out (EAT paper, arXiv 2401.03497, Sec. 3).

A student sees a few patches of a spectrogram and predicts what a teacher, a moving average (EMA) of it,
computes from the whole: the features of each masked patch, and with its CLS token their mean over the clip.

    Encoder           spectrogram -> tokens: a ViT with post-norm blocks; the class to copy for features
    make_targets      the teacher's feed-forward outputs -> what the student must predict
    Decoder           visible tokens -> a prediction for every patch: a small CNN
    EAT               student encoder + decoder -> the two losses (UFO: utterance-frame objective)
    AudioClassifier   encoder -> CLS token -> a score for each class

`from_pretrained` reads this project's run folders and .pt files and, with extras/released.py, released ones.
This file needs torch only and can be copied alone; `python model.py` prints sizes. Citations such as
models/mae.py:404 point into the released code (github.com/cwx-worst-one/EAT at 06c1c34).

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
import pickle
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6  # of the encoder's LayerNorms; target and decoder norms use PyTorch's 1e-5
MAX_PATCH_ROWS = 768  # longest input in patches of 16 frames: 768 * 0.16 s = 2 minutes
POOLINGS = ("cls", "mean", "bands")  # see `pool`


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
        P = self.patch_size
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and not (type(value) is int and 0 < value <= 12_288):
                raise ValueError(f"expected {field.name} from 1 to 12288, not {value!r}")
        if self.clip_frames not in range(P, P * MAX_PATCH_ROWS + 1, P) or self.mel_bins % P:
            raise ValueError(f"expected whole patches of {P}, at most {MAX_PATCH_ROWS} in time: {self}")
        if self.width % self.heads or self.width % 4 or self.depth > 256:
            raise ValueError(f"expected a width divisible by heads and by 4, and at most 256 blocks: {self}")
        if not (0 <= self.drop_path < 1 and abs(self.norm_mean) < math.inf and 0 < self.norm_std < math.inf):
            raise ValueError(f"expected a drop_path below 1, a finite norm_mean, a norm_std above 0: {self}")

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


def sincos_2d(rows: int, cols: int, width: int, device: torch.device | None = None) -> Tensor:
    """Fixed positions of a rows x cols (time x frequency) grid, time-major: (rows * cols, width).
    Channels: [sin f | cos f | sin t | cos t], a quarter of the width each. The paper (Sec. 3.1) says 1-D
    positions; the released weights were trained with these (models/images.py:109-125)."""
    exponent = torch.arange(width // 4, dtype=torch.float32, device=device) / (width // 4)
    omega = 1.0 / 10000**exponent                                        # (D/4,)
    n = torch.arange(rows * cols, device=device)[:, None]                # (rows*cols, 1)
    t = n // cols * omega                                                # (rows*cols, D/4)
    f = n % cols * omega                                                 # (rows*cols, D/4)
    return torch.cat([f.sin(), f.cos(), t.sin(), t.cos()], dim=1)        # (rows*cols, D)


def flat_rows(ids: Tensor, n: int) -> Tensor:
    """Patch indices within each clip, (B, k) -> row indices into all clips' patches, (B*n, D): (B*k,)."""
    first = n * torch.arange(ids.shape[0], device=ids.device)[:, None]   # (B, 1)
    return (first + ids).flatten()


class LayerNorm(nn.LayerNorm):
    """Keeps the type of x, with statistics in fp32; under autocast nn.LayerNorm would return fp32."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None
        bias = None
        if self.elementwise_affine:
            weight = self.weight.to(x.dtype)
            bias = self.bias.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


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
        q, k, v = [part.transpose(1, 2) for part in qkv.unbind(2)]    # 3 x (B, heads, T, D/heads)
        x = F.scaled_dot_product_attention(q, k, v)                   # (B, heads, T, D/heads)
        x = x.transpose(1, 2).reshape(B, T, D)                        # (B, T, D)
        return self.proj(x)


class MLP(nn.Module):
    """Feed-forward network of a block; (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def drop_path(x: Tensor, rate: float) -> Tensor:
    """Drop a residual branch for a fraction `rate` of the clips: (B, T, D) -> (B, T, D)."""
    if rate == 0:
        return x
    scale = x.new_empty(x.shape[0], 1, 1).bernoulli_(1 - rate).div_(1 - rate)  # (B, 1, 1), 0 where left out
    return x * scale


class Block(nn.Module):
    """Post-norm transformer block: each residual sum is normalised (models/modules.py:259-324).
    Returns the new tokens and the bare output of the feed-forward network, from which targets are made."""

    def __init__(self, config: ModelConfig, drop_path: float = 0.0):
        super().__init__()
        self.attn = Attention(config.width, config.heads)
        self.norm1 = LayerNorm(config.width, eps=NORM_EPS)
        self.mlp = MLP(config.width, config.mlp_ratio * config.width)
        self.norm2 = LayerNorm(config.width, eps=NORM_EPS)
        self.drop_path = drop_path  # in training only

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rate = 0.0
        if self.training:
            rate = self.drop_path
        x = self.norm1(x + drop_path(self.attn(x), rate))
        ffn = self.mlp(x)
        x = self.norm2(x + drop_path(ffn, rate))
        return x, ffn


class Encoder(nn.Module):
    """Vision transformer over patches: spec (B, 1, F, M) -> tokens (B, 1+N, D), the CLS token first."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        D = config.width
        P = config.patch_size
        self.patch_embed = nn.Conv2d(1, D, kernel_size=P, stride=P)
        self.cls_token = nn.Parameter(torch.empty(1, 1, D))
        self.norm_pre = nn.LayerNorm(D, eps=NORM_EPS)
        rates = [config.drop_path * i / max(1, config.depth - 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList([Block(config, rate) for rate in rates])
        if not self.cls_token.is_meta:  # else a checkpoint provides the weights
            self.init_weights()

    def init_weights(self) -> None:
        """As in the released code (EAT_pretraining.py:243-251); everything else keeps PyTorch's default."""
        nn.init.xavier_uniform_(self.patch_embed.weight.view(self.config.width, -1))
        nn.init.normal_(self.cls_token, std=1.0)  # not the usual 0.02
        for layer in self.blocks.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def embed(self, spec: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """CLS token and patches with positions, only the visible ones if ids_keep (B*C, V) is given:
        (B, 1, F, M) -> (B, 1+N, D) or (B*C, 1+V, D). Incomplete patches are left out. Raises ValueError."""
        if spec.ndim != 4 or spec.shape[1] != 1 or spec.shape[3] != self.config.mel_bins:
            raise ValueError(f"expected (B, 1, F, {self.config.mel_bins}), got {tuple(spec.shape)}")
        if not 1 <= self.config.grid(spec.shape[2])[0] <= MAX_PATCH_ROWS:
            raise ValueError(f"{spec.shape[2]} frames are not 1 to {MAX_PATCH_ROWS} patches")
        x = self.patch_embed(spec)                                        # (B, D, H, W)
        H, W = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)                                  # (B, N, D)
        dtype = x.dtype  # of autocast; fp32 from here to the norm
        pos_embed = sincos_2d(H, W, self.config.width, x.device)          # (N, D)
        x = x + pos_embed.to(self.cls_token)                              # (B, N, D)
        if ids_keep is not None:
            B, N, D = x.shape
            rows = flat_rows(ids_keep.reshape(B, -1), N)                  # (B*C*V,)
            x = x.reshape(B * N, D).index_select(0, rows)                 # (B*C*V, D)
            x = x.view(*ids_keep.shape, D)                                # (B*C, V, D)
        cls_token = self.cls_token.expand(x.shape[0], -1, -1)             # (B, 1, D) or (B*C, 1, D)
        x = torch.cat([cls_token, x], dim=1)                              # (B, 1+N, D) or (B*C, 1+V, D)
        return self.norm_pre(x).to(dtype)

    def forward(self, spec: Tensor, ids_keep: Tensor | None = None, n_blocks: int | None = None) -> Tensor:
        """Encode all patches or the visible ones: (B, 1, F, M) -> (B, 1+N, D) or (B*C, 1+V, D), CLS first;
        with `n_blocks`, by the first blocks only."""
        x = self.embed(spec, ids_keep)
        for block in self.blocks[:n_blocks]:
            x, _ = block(x)
        return x

    def ffn_outputs(self, spec: Tensor) -> list[Tensor]:
        """Feed-forward output of every block for all patches, without CLS: L x (B, N, D)."""
        x = self.embed(spec)
        outputs = []
        for block in self.blocks:
            x, ffn = block(x)
            outputs.append(ffn[:, 1:])
        return outputs

    @classmethod
    def from_pretrained(cls, path: str | Path, teacher: bool = False) -> "Encoder":
        """The encoder of any checkpoint that read_pretrained knows, in eval mode. Raises CheckpointError.
        For a pre-training run, the student, as in the released code, or with `teacher` its EMA."""
        state = read_pretrained(path)
        if teacher:
            return rebuild(cls, state, "teacher")
        part = "student" if "student" in state else "classifier"
        return rebuild(cls, state, part, "encoder.")


# ----- Pre-training: targets, decoder, loss ----------------------------------------------------------------


def make_targets(ffn_outputs: list[Tensor]) -> Tensor:
    """Average blocks' outputs into targets: L x (B, N, D) -> (B, N, D), fp32 (EAT_pretraining.py:785-828).
    Each block is first normalised per clip and channel over its patches, so that no block dominates and no
    constant offset can be predicted; the average is then normalised over channels. The paper (Sec. 3.2) says
    "outputs of all layers"; the released code takes the feed-forward networks', before residual and norm."""
    normed = [F.instance_norm(y.float().transpose(1, 2)) for y in ffn_outputs]  # L x (B, D, N)
    mean = (sum(normed) / len(normed)).transpose(1, 2)                          # (B, N, D)
    return F.layer_norm(mean, mean.shape[2:])


class Decoder(nn.Module):
    """CNN that predicts every patch from the visible ones (paper Sec. 3.3; models/modules.py:182-230).
    Only in the released code: grouped convolutions, residuals, norms without affine, a final linear layer,
    and small noise instead of a learned mask token. It needs no positions: convolutions see the grid."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D = config.width
        self.blocks = nn.ModuleList()
        for _ in range(config.decoder_depth):
            conv = nn.Conv2d(D, D, config.decoder_kernel, padding="same", groups=config.decoder_groups)
            self.blocks.append(conv)
        self.norm = LayerNorm(D, elementwise_affine=False)
        self.proj = nn.Linear(D, D)

    def forward(self, tokens: Tensor, ids_keep: Tensor, noise: Tensor, grid: tuple[int, int]) -> Tensor:
        """Put tokens (B*C, V, D) in their places among `noise` (B*C, N, D), and decode: (B*C, N, D)."""
        BC, N, D = noise.shape
        H, W = grid
        rows = flat_rows(ids_keep, N)                                          # (B*C*V,)
        fill = noise.reshape(BC * N, D).to(tokens.dtype)                       # (B*C*N, D)
        x = fill.index_copy(0, rows, tokens.reshape(-1, D)).view(BC, H, W, D)  # (B*C, H, W, D)
        for conv in self.blocks:  # channels stay last in memory: neither conv nor norm copies
            y = conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)                # (B*C, H, W, D)
            x = x + F.gelu(self.norm(y))
        return self.proj(x.reshape(BC, N, D))                                  # (B*C, N, D)


def ufo_loss(pred: Tensor, cls: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Utterance-frame objective (paper Sec. 3.2): (MSE_frame, MSE_utterance), fp32 scalars.
    pred (B*C, N, D) against targets (B, N, D) at the masked patches of mask (B*C, N); cls (B*C, D) against
    the clip's mean target. The targets are broadcast over the clones, not copied."""
    B, N, D = targets.shape
    pred = pred.float().view(B, -1, N, D)                                # (B, C, N, D)
    expected = targets[:, None].expand_as(pred)                          # (B, C, N, D)
    error = F.mse_loss(pred, expected, reduction="none").mean(-1)        # (B, C, N)
    mask = mask.view(B, -1, N).float()
    mse_frame = (error * mask).sum() / mask.sum()
    cls = cls.float().view(B, -1, D)                                     # (B, C, D)
    mse_utterance = (cls - targets.mean(1, keepdim=True)).square().mean()
    return mse_frame, mse_utterance


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
        term over the rows of one GPU (EAT_pretraining.py:760-776): its lambda = 1 is a weight of 12 clips *
        16 clones. With means, the weight does not depend on how a batch is divided."""
        grid = self.config.grid(spec.shape[2])
        tokens = self.encoder(spec, ids_keep)                        # (B*C, 1+V, D)
        pred = self.decoder(tokens[:, 1:], ids_keep, noise, grid)    # (B*C, N, D)
        mse_frame, mse_utterance = ufo_loss(pred, tokens[:, 0], targets, mask)
        scale = math.sqrt(self.config.width)
        loss_frame = scale * mse_frame
        loss_utterance = scale * utterance_weight * mse_utterance
        return dict(
            loss=loss_frame + loss_utterance, loss_frame=loss_frame.detach(),
            loss_utterance=loss_utterance.detach(), pred=pred.detach(),
        )  # fmt: skip

    @classmethod
    def from_pretrained(cls, path: str | Path) -> tuple["EAT", Encoder]:
        """Student and teacher of a pre-training checkpoint, in eval mode. Raises CheckpointError."""
        state = read_pretrained(path)
        teacher = rebuild(Encoder, state, "teacher")
        return rebuild(cls, state, "student"), teacher


# ----- Classification --------------------------------------------------------------------------------------


def pool(tokens: Tensor, spec: Tensor, config: ModelConfig, pooling: str) -> Tensor:
    """One vector for each clip, from its tokens (B, 1+N, D) and their spec (B, 1, F, M).
    cls, as in the paper, (B, D); mean over the patches, (B, D); or bands, (B, 2*W*D): mean and deviation over
    time of each band of 16 mel bins, without padding or digital silence (frames of equal mel bins)."""
    patches = tokens[:, 1:]                                        # (B, N, D)
    if pooling == "cls":
        return tokens[:, 0]                                        # (B, D)
    if pooling == "mean":
        return patches.mean(1)                                     # (B, D)
    H, W = config.grid(spec.shape[2])
    patches = patches.unflatten(1, (H, W))                         # (B, H, W, D)
    n_steps = (spec[..., 1:] != spec[..., :-1]).sum(3)             # (B, 1, F), from bin to bin
    is_sound = (n_steps > 2).float()                               # silence has 0, or 2 by SpecAugment
    share = F.avg_pool1d(is_sound, config.patch_size)[:, 0]        # (B, H) of each row of patches
    least = share.amax(1, keepdim=True).clamp(max=0.5)             # (B, 1): at least one row is used
    weight = (share >= least).float()[:, :, None, None]            # (B, H, 1, 1)
    total = weight.sum(1)                                          # (B, 1, 1)
    mean = (patches * weight).sum(1) / total                       # (B, W, D)
    square = (patches - mean[:, None]).square() * weight           # (B, H, W, D)
    std = (square.sum(1) / total + 1e-6).sqrt()                    # (B, W, D)
    return torch.cat([mean, std], dim=1).flatten(1)                # (B, 2*W*D)


class AudioClassifier(nn.Module):
    """Encoder, LayerNorm and a linear head (paper Sec. 3.4; models/EAT_audio_classification.py:365-457).
    classes: label in the manifest -> name to display, in the order of the outputs.
    pooling: how tokens become one vector (`pool`). block: the block whose output is used, 0 = the last.
    exclusive: a clip has exactly one class, so that probabilities are a softmax, not a sigmoid of each.
    norm_eps: of the LayerNorm, None = without one. Raises ValueError or TypeError for other settings."""

    def __init__(
        self, config: ModelConfig, classes: dict[str, str], pooling: str = "cls", exclusive: bool = False,
        norm_eps: float | None = NORM_EPS, block: int = 0,
    ):  # fmt: skip
        super().__init__()
        if pooling not in POOLINGS or block not in range(config.depth + 1) or not 0 <= (norm_eps or 0) < 1:
            raise ValueError(f"no such head: pooling {pooling!r}, block {block!r}, norm_eps {norm_eps!r}")
        "".join([*classes, *classes.values()])  # raises TypeError unless all are strings
        self.head_settings = dict(
            classes=classes, pooling=pooling, exclusive=exclusive, norm_eps=norm_eps, block=block
        )
        self.config = config
        self.classes = classes
        self.pooling = pooling
        self.exclusive = exclusive
        self.block = block
        self.encoder = Encoder(config)
        width = config.width
        if pooling == "bands":
            width *= 2 * config.mel_bins // config.patch_size
        self.fc_norm = nn.Identity()
        if norm_eps is not None:
            self.fc_norm = LayerNorm(width, eps=norm_eps)
        self.head = nn.Linear(width, len(classes))
        if not self.head.weight.is_meta:
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def forward(self, spec: Tensor) -> Tensor:
        """(B, 1, F, M) -> logits (B, classes)."""
        tokens = self.encoder(spec, n_blocks=self.block or None)   # (B, 1+N, D)
        pooled = pool(tokens, spec, self.config, self.pooling)     # (B, D) or wider
        return self.head(self.fc_norm(pooled))                     # (B, classes)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits as probabilities, (B, classes)."""
        return logits.softmax(1) if self.exclusive else logits.sigmoid()

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "AudioClassifier":
        """The classifier of any fine-tuned checkpoint, in eval mode. Raises CheckpointError."""
        return rebuild(cls, read_pretrained(path), "classifier")


# ----- Checkpoints -----------------------------------------------------------------------------------------
# Dicts of tensors and plain values. `network` has a ModelConfig's fields; the weights are those of `student`
# (an EAT) and `teacher` (an Encoder), or of a `classifier`, whose other arguments are in `head`.


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says why, in one line."""


@contextlib.contextmanager
def refusing(path: str | Path) -> Iterator[None]:
    """Turn any exception that a damaged or foreign file causes into a CheckpointError of one line.
    An OSError stays an OSError: lack of permission or memory says nothing about the file."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # zipfile, pickle and torch raise many types for bad files
        if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.ENOENT, None):
            raise  # the other three come from wrong offsets in a damaged file
        if isinstance(error, MemoryError) or "allocate" in str(error):
            raise OSError(errno.ENOMEM, "not enough memory", str(path)) from None
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if isinstance(error, pickle.UnpicklingError):  # torch.load runs no code
            reason = "it is damaged, or holds Python objects, which could run code"
        raise CheckpointError(f"{path} is not a checkpoint of this model: {reason}") from None


def load_checkpoint(path: str | Path) -> dict:
    """Read a file of tensors and plain values, on the CPU, without running anything in it.
    Raises CheckpointError if it is missing, damaged or holds objects; OSError if it cannot be read now."""
    if not os.path.isfile(path):
        raise CheckpointError(f"there is no file {path}")
    with refusing(path):
        if zipfile.is_zipfile(path):  # torch.load verifies no checksums
            damaged = zipfile.ZipFile(path).testzip()
            if damaged:
                raise ValueError(f"{damaged} does not match its checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
    return state


def read_pretrained(path: str | Path) -> dict:
    """What a checkpoint holds: `network`, `student` and `teacher` or `classifier` and `head`; and its `path`.
    Takes a run folder (its best.pt, else last.pt) or a .pt file. extras/released.py reads other formats:
    released fairseq files and Hugging Face folders. Raises CheckpointError."""
    for name in ("best.pt", "last.pt", "previous.pt"):
        if os.path.isfile(os.path.join(path, name)):
            path = os.path.join(path, name)
            break
    state = {}
    if os.path.isfile(path):
        with contextlib.suppress(CheckpointError):  # released files hold more than tensors
            state = load_checkpoint(path)
    if "network" not in state:
        try:
            from extras.released import read_released
        except ImportError:
            raise CheckpointError(f"{path} is not of this project: extras/released.py is missing") from None
        state = read_released(str(path), state)
    state["path"] = path
    return state


def rebuild(cls: type[nn.Module], state: dict, part: str, prefix: str = "") -> nn.Module:
    """The network that a checkpoint's `part` holds, behind `prefix`, in eval mode. Raises CheckpointError."""
    if not state.get(part):
        raise CheckpointError(f"{state['path']} has no {part}: it is another kind of checkpoint")
    with refusing(state["path"]):
        config = ModelConfig(**state["network"])
        settings = state["head"] if cls is AudioClassifier else {}
        with torch.device("meta"):  # a false size allocates nothing
            model = cls(config, **settings)
        weights = {}
        for name, weight in state[part].items():
            if name.startswith(prefix):
                weights[name.removeprefix(prefix)] = weight
        model.load_state_dict(weights, assign=True)
        if not all(p.isfinite().all() for p in model.parameters()):
            raise ValueError("its weights are not finite: its training has diverged")
    return model.float().eval()


if __name__ == "__main__":
    for name, config in MODELS.items():
        with torch.device("meta"):  # no memory, no arithmetic
            eat = EAT(config)
        encoder = sum(p.numel() for p in eat.encoder.parameters())
        decoder = sum(p.numel() for p in eat.decoder.parameters())
        print(f"{name:6s} encoder {encoder:>12,} parameters, decoder {decoder:>10,}")
