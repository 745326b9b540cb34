"""A frozen encoder in the interface of HEAR (hearbenchmark.com), for its runner and other tools that use it.

    cd extras/benchmarks && python -m heareval.embeddings.runner hear_api --model CKPT --tasks-dir TASKS

CKPT is what model.read_pretrained knows, the published base weights by default. A frame of 160 ms has the
tokens of its 8 bands, concatenated, and the CLS token of its piece of `clip_frames`, from the block at 7/12
of the depth, reported as the best of the published weights (extras/runs/laptop/README.md).
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import model as eat  # noqa: E402
from data import FRAME_SHIFT, SAMPLE_RATE, clip_samples, spectrogram  # noqa: E402
from evaluate import probe_block  # noqa: E402

PUBLISHED = "worstchan/EAT-base_epoch30_pretrain"


def load_model(path: str = "") -> nn.Module:
    """The encoder with what HEAR asks for: sample_rate and the sizes of its embeddings."""
    encoder = eat.Encoder.from_pretrained(path or PUBLISHED)
    _, bands = encoder.config.grid(0)
    size = (bands + 1) * encoder.config.width
    encoder.sample_rate = SAMPLE_RATE
    encoder.scene_embedding_size = size
    encoder.timestamp_embedding_size = size
    return encoder


def frames_of_piece(piece: Tensor, model: nn.Module) -> Tensor:
    """Frames of a stretch of audio (n, S) that is at most as long as the clips of training, padded to their
    length: (n, H, 9D)."""
    config = model.config
    n_samples = torch.full((len(piece),), piece.shape[1], device=piece.device)
    piece = F.pad(piece, (0, clip_samples(config.clip_frames) - piece.shape[1]))
    spec = spectrogram(piece, n_samples, config.norm_mean, config.norm_std)
    tokens = model(spec, n_blocks=probe_block(config))                           # (n, 1+N, D)
    patches = tokens[:, 1:].unflatten(1, config.grid(config.clip_frames))        # (n, H, 8, D)
    patches = patches.flatten(2)                                                 # (n, H, 8D)
    cls = tokens[:, :1].expand(-1, patches.shape[1], -1)                         # (n, H, D)
    return torch.cat([patches, cls], dim=2)                                      # (n, H, 9D)


@torch.no_grad()
def get_timestamp_embeddings(audio: Tensor, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Frames of audio (n, S), of any length: (n, T, 9D), and the middle of each in milliseconds, (n, T)."""
    config = model.config
    audio = audio.to(model.cls_token.device)
    n, S = audio.shape
    shift = config.patch_size * FRAME_SHIFT  # samples a frame
    hop = config.clip_frames * FRAME_SHIFT
    width = clip_samples(config.clip_frames)
    pieces = []
    for start in range(0, max(1, S - shift + 1), hop):
        pieces.append(frames_of_piece(audio[:, start : start + width], model))   # (n, H, 9D)
    frames = torch.cat(pieces, dim=1)[:, : max(1, S // shift)].float()           # (n, T, 9D)
    times = torch.arange(frames.shape[1], device=audio.device) + 0.5             # (T,)
    times = (times * (1000 * shift / SAMPLE_RATE)).clamp(max=1000 * S / SAMPLE_RATE)
    return frames, times.expand(n, -1)


def get_scene_embeddings(audio: Tensor, model: nn.Module) -> Tensor:
    """The mean frame of audio (n, S): (n, 9D)."""
    frames, _ = get_timestamp_embeddings(audio, model)
    return frames.mean(1)
