"""A network and its front end as one file, for extras/released.py: model.onnx, which runs where neither torch
nor this project is installed, and model.pt2, for torch.export.load.

    waveform (batch, samples)   float32, 16 kHz mono in [-1, 1]; a batch has clips of equal length
    probabilities               of a classifier: (batch, classes)
    tokens                      of an encoder: (batch, 1 + N, width), the CLS token, then 8 a row, low to high
    times                       of an encoder: (rows,), seconds at the middle of each row of 160 ms

Any length from one frame (400 samples) to two minutes; others are refused. Input shorter than the training
clips is padded to their length, as evaluate.py and listen.py do; longer input is taken as a whole, not in
windows. Frames at the end that do not fill a row are left out. The metadata of model.onnx has
sample_rate, norm_mean, norm_std, clip_seconds and, as JSON, `classes` (names), `labels` (of the manifest) and
`exclusive` (whether a clip has exactly one).
"""

import contextlib
import json
import logging
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from data import FRAME_LENGTH, FRAME_SHIFT, SAMPLE_RATE, clip_samples, spectrogram
from model import MAX_PATCH_ROWS, AudioClassifier, CheckpointError, Encoder, read_pretrained

TOLERANCE = 1e-4  # largest error of model.onnx, relative to the largest output if that is above 1
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
CARD = """
## model.onnx

The same network with its front end, for `pip install onnxruntime soundfile`. Input `waveform`: float32
(batch, samples), 16 kHz mono in [-1, 1], from 25 ms to two minutes. Output: {output}.
Clips in training had {width:,} samples: shorter ones are padded, which changes what is heard; longer
recordings are best cut into windows of that length.

```python
{imports}import onnxruntime, soundfile

session = onnxruntime.InferenceSession("model.onnx")
samples, rate = soundfile.read("clip.wav", dtype="float32")  # 16 kHz mono
{use}
```
"""
USE_OF_ENCODER = """tokens, times = session.run(None, {{"waveform": samples[None]}})
print(tokens.shape, times)"""
USE_OF_CLASSIFIER = """classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
for start in range(0, max(1, len(samples) - {patch} + 1), {hop}):  # a window every {seconds:g} s
    start = max(0, min(start, len(samples) - {width}))  # the last one ends with the recording
    window = samples[None, start : start + {width}]
    p = session.run(None, {{"waveform": window}})[0][0]
    print(f"{{start / 16000:.2f}} s  {{classes[p.argmax()]}} {{p.max():.3f}}")"""


class FromSamples(nn.Module):
    """An Encoder or AudioClassifier behind its front end."""

    def __init__(self, model: Encoder | AudioClassifier):
        super().__init__()
        self.model = model
        self.config = model.config
        self.row_samples = model.config.patch_size * FRAME_SHIFT
        self.most_samples = clip_samples(MAX_PATCH_ROWS * model.config.patch_size) + self.row_samples - 1
        self.register_buffer("nothing", torch.zeros(1, dtype=torch.int64))

    def excess(self, n_samples: int) -> Tensor:
        """0 or, if the length is refused, an index out of bounds: the only error that ONNX can raise."""
        n = torch.full((1,), n_samples)
        excess = torch.maximum(FRAME_LENGTH - n, n - self.most_samples).clamp(min=0)
        return self.nothing.index_select(0, excess)

    def pad(self, waveform: Tensor) -> Tensor:
        """Append zeros up to the clip's length, cut what fills no row: (B, S) -> (B, clip_samples(...)).
        The number of rows is a value in the graph, not a formula of its sizes: torch.export cannot simplify
        formulas that contain a maximum."""
        S = waveform.shape[1]
        own_rows = 1 + (S - clip_samples(self.config.patch_size)) // self.row_samples
        least = self.config.clip_frames // self.config.patch_size
        rows = torch.full((), own_rows).clamp(min=least).item()
        torch._check(rows >= least)
        torch._check(rows <= MAX_PATCH_ROWS)
        places = torch.arange(clip_samples(rows * self.config.patch_size))
        padded = waveform.index_select(1, places.clamp(max=S - 1))
        return padded * (places < S)

    def forward(self, waveform: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """(B, S) -> probabilities (B, classes), or tokens (B, 1+N, D) and times (H,)."""
        B, S = waveform.shape
        padded = self.pad(waveform)                                              # (B, clip_samples(...))
        n_samples = torch.full((B,), S).clamp(max=padded.shape[1]) + self.excess(S)
        spec = spectrogram(padded, n_samples, self.config.norm_mean, self.config.norm_std)
        if isinstance(self.model, AudioClassifier):
            return self.model.probabilities(self.model(spec))
        tokens = self.model(spec)
        _, W = self.config.grid(0)
        own_rows = 1 + (S - clip_samples(self.config.patch_size)) // self.row_samples
        rows = torch.full((), own_rows).clamp(min=1).item()
        torch._check(rows >= 1)
        torch._check(rows <= MAX_PATCH_ROWS)
        tokens = tokens.index_select(1, torch.arange(1 + rows * W))
        times = (torch.arange(rows) + 0.5) * (self.row_samples / SAMPLE_RATE)
        return tokens, times


def check_packages(onnx: bool) -> None:
    """Raise CheckpointError, which says what to install, if a package is missing that `write` or the export
    beside it needs."""
    needed = ["safetensors"]
    if onnx:
        needed += PACKAGES
    missing = [name for name in needed if not find_spec(name)]
    if missing:
        raise CheckpointError(f"this needs {', '.join(needed)}: pip install {' '.join(missing)}")


def write(source: str, folder: Path, onnx: bool, pt2: bool) -> list[str]:
    """Write a checkpoint as model.onnx and model.pt2: the names of what was written. Raises CheckpointError
    if onnxruntime computes something else than the model."""
    if read_pretrained(source).get("head"):
        model = AudioClassifier.from_pretrained(source)
    else:
        model = Encoder.from_pretrained(source)
    module = FromSamples(model).eval()
    example = noise(2, clip_samples(model.config.clip_frames))
    written = []
    with torch.no_grad(), quiet():
        module(example)  # fills the front end's caches: tables cached in a trace would hold no numbers
        batch = torch.export.Dim("batch")
        samples = torch.export.Dim("samples", min=FRAME_LENGTH, max=module.most_samples)
        shapes = ({0: batch, 1: samples},)
        program = torch.export.export(module, (example,), dynamic_shapes=shapes)
        if pt2:
            settings = {"metadata.json": json.dumps(metadata(model))}
            torch.export.save(program, folder / "model.pt2", extra_files=settings)
            written.append("model.pt2")
        if onnx:
            write_onnx(program, module, shapes, folder / "model.onnx")
            written.append("model.onnx")
            with open(folder / "README.md", "a", encoding="utf-8") as card:
                card.write(card_of_onnx(model))
    return written


def noise(n_clips: int, n_samples: int) -> Tensor:
    """Quiet noise, always the same."""
    generator = torch.Generator().manual_seed(n_samples)
    return 0.1 * torch.randn(n_clips, n_samples, generator=generator)


@contextlib.contextmanager
def quiet():
    """Without the exporter's remarks on packages that are not needed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logger.setLevel(level)


def metadata(model: Encoder | AudioClassifier) -> dict[str, str]:
    """What a user of the file must know."""
    config = model.config
    found = dict(
        sample_rate=str(SAMPLE_RATE), norm_mean=str(config.norm_mean), norm_std=str(config.norm_std),
        clip_seconds=str(clip_samples(config.clip_frames) / SAMPLE_RATE),
    )  # fmt: skip
    if isinstance(model, AudioClassifier):
        found["classes"] = json.dumps(list(model.classes.values()))
        found["labels"] = json.dumps(list(model.classes))
        found["exclusive"] = json.dumps(model.exclusive)
    return found


def card_of_onnx(model: Encoder | AudioClassifier) -> str:
    """The model card's section on model.onnx; a classifier hears listen.py's windows, and silent ones."""
    hop = model.config.clip_frames * FRAME_SHIFT
    width = clip_samples(model.config.clip_frames)
    if isinstance(model, AudioClassifier):
        output = "`probabilities` (batch, classes)"
        imports = "import json\n"
        use = USE_OF_CLASSIFIER
    else:
        output = "`tokens` (batch, 1 + 8 * rows, width), the CLS token first, and `times` (rows,), in seconds"
        imports = ""
        use = USE_OF_ENCODER
    patch = model.config.patch_size * FRAME_SHIFT
    use = use.format(hop=hop, width=width, patch=patch, seconds=hop / SAMPLE_RATE)
    return CARD.format(width=width, output=output, imports=imports, use=use)


def write_onnx(program: torch.export.ExportedProgram, module: FromSamples, shapes: tuple, path: Path) -> None:
    """Write an exported FromSamples and compare it with the module. Raises CheckpointError."""
    outputs = ["tokens", "times"]
    if isinstance(module.model, AudioClassifier):
        outputs = ["probabilities"]
    converted = torch.onnx.export(
        program, input_names=["waveform"], output_names=outputs, dynamic_shapes=shapes, external_data=False,
        verbose=False,
    )  # fmt: skip
    converted.model.metadata_props.clear()
    converted.model.metadata_props.update(metadata(module.model))
    converted.model.doc_string = __doc__
    converted.save(path)
    error = largest_error(path, module)
    if not error <= TOLERANCE:
        path.unlink()
        raise CheckpointError(f"onnxruntime and the model differ by {error:.1g}: no model.onnx was written")


def largest_error(path: Path, module: FromSamples) -> float:
    """The largest difference between a file and the module, at several lengths and numbers of clips."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    clip = clip_samples(module.config.clip_frames)
    errors = []
    for n_clips, n_samples in ((1, FRAME_LENGTH), (3, clip // 2), (2, clip), (1, clip + clip // 2)):
        waveform = noise(n_clips, n_samples)
        expected = module(waveform)
        if isinstance(expected, Tensor):
            expected = (expected,)
        found = session.run(None, dict(waveform=waveform.numpy()))
        for ours, theirs in zip(expected, found, strict=True):
            difference = (ours - torch.from_numpy(theirs)).abs().max()
            errors.append(float(difference / ours.abs().max().clamp(min=1)))
    return max(errors)
