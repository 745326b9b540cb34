"""A frozen encoder in the interface of X-ARES (pip install xares), with the frames of hear_api.py.

    ln -s THIS_REPOSITORY eat
    EAT_CHECKPOINT=CKPT python -m xares.run eat/extras/benchmarks/xares_encoder.py src/tasks/*.py

Run both in a clone of X-ARES, which has the tasks: it takes only paths below the current folder. CKPT is
what model.read_pretrained knows (an absolute path), the published base weights by default.
"""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import hear_api  # noqa: E402


class EatEncoder(torch.nn.Module):  # X-ARES takes the one name in this file that ends in Encoder
    """What X-ARES asks for: sampling_rate, output_dim, hop_size_in_ms, and frames of waveforms."""

    def __init__(self):
        super().__init__()
        self.model = hear_api.load_model(os.environ.get("EAT_CHECKPOINT", ""))
        self.sampling_rate = self.model.sample_rate
        self.output_dim = self.model.timestamp_embedding_size
        self.hop_size_in_ms = 160

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        """Frames of audio (n, S) or (S,): (n, T, 9D)."""
        frames, _ = hear_api.get_timestamp_embeddings(torch.atleast_2d(audio), self.model)
        return frames
