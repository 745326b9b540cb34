"""An EAT for Hugging Face's transformers (4.57 or later): the network of model.py, beside this file.

    model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True).eval()
    spec = model.spectrogram(waveform)       # 16 kHz mono: (B, S) -> (B, 1, F, M)
    tokens = model(spec).last_hidden_state   # of an encoder: (B, 1+N, D), the CLS token first
    logits = model(spec).logits              # of a classifier: (B, classes); model.config.id2label names them
"""

import torch
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput

from .front_end import FRAME_LENGTH, FRAME_SHIFT, spectrogram
from .model import AudioClassifier, Encoder, ModelConfig


class EATConfig(PretrainedConfig):
    """network: a ModelConfig's fields. head: an AudioClassifier's other arguments, but for the classes; None
    for an encoder. classes: [label, name] of each class."""

    model_type = "eat"

    def __init__(self, network: dict | None = None, head: dict | None = None, classes: list = (), **others):
        self.network = network or {}
        self.head = head
        self.classes = list(classes)
        super().__init__(**others)


class EATModel(PreTrainedModel):
    """An Encoder or, if the configuration has a head, an AudioClassifier."""

    config_class = EATConfig

    def __init__(self, config: EATConfig):
        super().__init__(config)
        network = ModelConfig(**config.network)
        if config.head:
            self.model = AudioClassifier(network, dict(config.classes), **config.head)
        else:
            self.model = Encoder(network)
        self.post_init()

    def _init_weights(self, module):
        """Nothing: Encoder and AudioClassifier initialise themselves."""

    def spectrogram(self, waveform: torch.Tensor) -> torch.Tensor:
        """16 kHz mono in [-1, 1], of equal length, (B, S) -> the model's input (B, 1, F, M). Clips shorter
        than those of training are padded to their length, as in training."""
        network = self.model.config
        B, S = waveform.shape
        n_samples = torch.full((B,), S, device=waveform.device)
        wanted = (network.clip_frames - 1) * FRAME_SHIFT + FRAME_LENGTH
        padded = F.pad(waveform, (0, max(0, wanted - S)))
        return spectrogram(padded, n_samples, network.norm_mean, network.norm_std)

    def forward(self, input_values: torch.Tensor, **_) -> BaseModelOutput | SequenceClassifierOutput:
        """Spectrograms (B, 1, F, M) -> tokens (B, 1+N, D) or logits (B, classes)."""
        output = self.model(input_values)
        if self.config.head:
            return SequenceClassifierOutput(logits=output)
        return BaseModelOutput(last_hidden_state=output)

    def extract_features(self, input_values: torch.Tensor) -> torch.Tensor:
        """Tokens of the last block, (B, 1+N, D), of a classifier too."""
        encoder = self.model.encoder if self.config.head else self.model
        return encoder(input_values)
