"""A frozen encoder in the interface of X-ARES (pip install xares), with the frames of hear_api.py.

    EAT_CHECKPOINT=CKPT python -m xares.run extras/benchmarks/xares_encoder.py src/tasks/*.py

CKPT is what model.read_pretrained knows, the published base weights by default; the tasks are in the
repository of X-ARES.
"""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import hear_api  # noqa: E402


class EatEncoder(torch.nn.Module):  # X-ARES takes the one name in this file that ends in Encoder
    def __init__(self):
        super().__init__()
        self.model = hear_api.load_model(os.environ.get("EAT_CHECKPOINT", ""))
        self.sampling_rate, self.output_dim = self.model.sample_rate, self.model.timestamp_embedding_size
        self.hop_size_in_ms = 160

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        """Frames of audio (n, S) or (S,): (n, T, 9D)."""
        return hear_api.get_timestamp_embeddings(torch.atleast_2d(audio), self.model)[0]
