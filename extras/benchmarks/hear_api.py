"""A frozen encoder in the interface of HEAR (hearbenchmark.com), for its runner and whatever else speaks it.

    cd extras/benchmarks && python -m heareval.embeddings.runner hear_api --model CKPT --tasks-dir TASKS

CKPT is what model.read_pretrained knows, the published base weights by default. A frame has, for 160 ms, the
tokens of its 8 bands, one behind the other, and the CLS token of its piece of --clip_frames; of the
block at 7/12 of the depth, reported as the best of the published weights (extras/runs/laptop/README.md).
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import model as eat  # noqa: E402
from data import FRAME_SHIFT, SAMPLE_RATE, clip_samples, spectrogram  # noqa: E402
from evaluate import tokens_after  # noqa: E402


def load_model(path: str = "") -> nn.Module:
    """The encoder with what HEAR asks for: sample_rate and the sizes of its embeddings."""
    encoder = eat.Encoder.from_pretrained(path or "worstchan/EAT-base_epoch30_pretrain")
    encoder.sample_rate, (_, bands) = SAMPLE_RATE, encoder.config.grid(0)
    encoder.scene_embedding_size = encoder.timestamp_embedding_size = (bands + 1) * encoder.config.width
    return encoder


@torch.no_grad()
def get_timestamp_embeddings(audio: Tensor, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Frames of audio (n, S), of any length: (n, T, 9D), and the middle of each in milliseconds, (n, T)."""
    c, audio, frames = model.config, audio.to(model.cls_token.device), []
    encode, shift = tokens_after(model), c.patch_size * FRAME_SHIFT
    width = clip_samples(c.clip_frames)
    for start in range(0, max(1, audio.shape[1] - shift + 1), c.grid(c.clip_frames)[0] * shift):
        piece = audio[:, start : start + width]
        n_samples = torch.full((len(piece),), piece.shape[1], device=piece.device)
        piece = F.pad(piece, (0, width - piece.shape[1]))
        tokens = encode(spectrogram(piece, n_samples, c.norm_mean, c.norm_std))      # (n, 1+N, D)
        patches = tokens[:, 1:].unflatten(1, c.grid(c.clip_frames)).flatten(2)       # (n, H, 8D)
        cls = tokens[:, :1].expand(-1, patches.shape[1], -1)                         # (n, H, D)
        frames.append(torch.cat([patches, cls], dim=2))                              # (n, H, 9D)
    frames = torch.cat(frames, dim=1)[:, : max(1, audio.shape[1] // shift)].float()  # (n, T, 9D)
    times = (torch.arange(frames.shape[1], device=audio.device) + 0.5) * (1000 * shift / SAMPLE_RATE)
    return frames, times.clamp(max=1000 * audio.shape[1] / SAMPLE_RATE).expand(len(audio), -1)


def get_scene_embeddings(audio: Tensor, model: nn.Module) -> Tensor:
    """The mean frame of audio (n, S): (n, 9D)."""
    return get_timestamp_embeddings(audio, model)[0].mean(1)
