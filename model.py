"""The EAT model: spectrogram in, tokens or loss out (EAT paper, arXiv 2401.03497, Sec. 3).

A student sees a few visible patches of a spectrogram and predicts what a teacher, an exponential moving average (EMA)
of the student, computes from the whole of it: for each masked patch its features (the frame loss), and with its CLS
token their mean over the clip (the utterance loss).

    Encoder        spectrogram -> tokens: a ViT with post-norm blocks; this is the class to copy for features
    make_targets   the teacher's feed-forward outputs -> what the student must predict
    Decoder        visible tokens -> a prediction for every patch: a small CNN
    EAT            student encoder + decoder -> the two losses (UFO: utterance-frame objective)

`python model.py` prints sizes and the shape of every stage. This file needs torch only and can be copied alone.
Citations such as models/mae.py:404 point into the released code (github.com/cwx-worst-one/EAT at 06c1c34).

Shapes:
    B  clips                             H, W  patches in time and frequency: 64 x 8 for 10 s
    C  masked copies (clones) of a clip  N     patches of a clip: H * W = 512
    F  frames of 10 ms: 1024             V     visible patches: 102
    M  mel bins: 128                     D     width: 768
    T  tokens: CLS and patches           L     blocks: 12
Rows of a (B*C, ...) tensor are clone-minor: row b * C + c is copy c of clip b.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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

    def __post_init__(self):
        for ok, message in (
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


class MLP(nn.Module):
    """Feed-forward network of a block; (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Post-norm transformer block: each residual sum is normalised after the addition (models/modules.py:259-324).

    Returns the new tokens and, because the targets are made of it, the bare output of the feed-forward network.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attn = Attention(config.width, config.heads)
        self.norm1 = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.mlp = MLP(config.width, config.mlp_ratio * config.width)
        self.norm2 = nn.LayerNorm(config.width, eps=NORM_EPS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm1(x + self.attn(x))
        ffn = self.mlp(x)
        return self.norm2(x + ffn), ffn


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
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.depth)])
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

    def ffn_outputs(self, spec: Tensor) -> list[Tensor]:
        """Feed-forward output of every block for all patches, without CLS: L x (B, N, D)."""
        x, outputs = self.embed(spec), []
        for block in self.blocks:
            x, ffn = block(x)
            outputs.append(ffn[:, 1:])
        return outputs


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
            x = x + F.gelu(F.layer_norm(y, (D,)))
        return self.proj(x.reshape(BC, N, D))                                           # (B*C, N, D)


def ufo_loss(pred: Tensor, cls: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared errors of the utterance-frame objective (paper Sec. 3.2): (MSE_frame, MSE_utterance), fp32 scalars.

    pred (B*C, N, D) against targets (B, N, D) at the masked patches of mask (B*C, N); cls (B*C, D) against the clip's
    mean target. The targets are broadcast over the clones, not copied.
    """
    B, N, D = targets.shape
    frame = (pred.float().view(B, -1, N, D) - targets[:, None]).square().mean(-1)       # (B, C, N)
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


if __name__ == "__main__":
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
