"""Draw the method in one picture: python extras/draw_method.py writes extras/method.png.

The spectrogram, its masks and the targets Y are real: Y is what an untrained teacher of the small model makes
(its colour: the first principal component of the vectors). The prediction is a sketch: Y, blurred.
"""

import sys
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data import clip_samples, load_audio, spectrogram  # noqa: E402
from masking import inverse_block_mask  # noqa: E402
from model import MODELS, Encoder, make_targets  # noqa: E402

try:
    import matplotlib
    from PIL import Image  # which matplotlib needs too
except ImportError:
    sys.exit("the picture needs the package matplotlib: pip install matplotlib")
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import FancyBboxPatch, Rectangle  # noqa: E402

# In pixels; these are the coordinates below, y points down
WIDTH = 1800
HEIGHT = 1000
DPI = 150
GRID = (64, 8)  # patches in time and frequency
TEACHER = "#2b6cb0"
STUDENT = "#c05621"
DECODER = "#2f855a"
LOSS = "#b8255f"
INK = "#1f2933"
GREY = "#5b6470"
MASKED = "#d5d9df"
MAGMA = matplotlib.colormaps["magma"]
VIRIDIS = matplotlib.colormaps["viridis"]
RANGE = dict(vmin=-1.3, vmax=1.1)  # of the spectrogram: a clip and its copies have the same colours

figure = plt.figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI, facecolor="white")
axis = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(HEIGHT, 0))
axis.axis("off")


class Drawn(NamedTuple):
    """What is shown, as pictures: time from left to right, high frequencies on top."""

    spec: Tensor  # (M, F)
    masks: Tensor  # (4, W, H)
    targets: Tensor  # (W, H)
    prediction: Tensor  # (W, H)


def as_picture(x: Tensor) -> Tensor:
    """Patches in time-major order as pictures: (n, N) -> (n, W, H)."""
    return x.unflatten(1, GRID).transpose(1, 2).flip(1)


def enlarge(patches: Tensor) -> Tensor:
    """A picture of patches as one of mel bins and frames: (W, H) -> (M, F)."""
    return patches.repeat_interleave(16, 0).repeat_interleave(16, 1)


@torch.no_grad()
def compute() -> Drawn:
    """What the small model makes of a clip."""
    config = MODELS["small"]
    generator = torch.Generator().manual_seed(0)
    size = clip_samples(config.clip_frames)
    waveform = load_audio(ROOT / "extras/demo/prompts/000.opus", 0, size)
    n_samples = torch.tensor([len(waveform)])
    padded = F.pad(waveform, (0, size - len(waveform)))[None]                  # (1, S)
    spec = spectrogram(padded, n_samples, config.norm_mean, config.norm_std)   # (1, 1, F, M)
    torch.manual_seed(0)
    targets = make_targets(Encoder(config).ffn_outputs(spec))[0]               # (N, D)
    svd = torch.linalg.svd(targets - targets.mean(0), full_matrices=False)
    component = svd.U[:, :1].T                                                 # (1, N)
    targets = as_picture((component / component.std()).sigmoid())              # (1, W, H)
    prediction = F.avg_pool2d(targets, 3, stride=1, padding=1, count_include_pad=False)
    masks = as_picture(inverse_block_mask(4, GRID, generator=generator))
    return Drawn(spec[0, 0].T.flip(0), masks, targets[0], prediction[0])


# ----- Shapes ----------------------------------------------------------------------------------------------


def write(x, y, text, color=INK, size=10.8, ha="center", **options):
    """Lines of text around y."""
    lines = text.split("\n")
    top = y - 30 * (len(lines) / 2 - 0.5) + 8
    for i, line in enumerate(lines):
        axis.text(x, top + 30 * i, line, color=color, size=size, ha=ha, **options)


def write_bold(x, y, text, color=INK, size=13, **options):
    write(x, y, text, color, size, weight="bold", **options)


def box(x, y, width, height, color, title, text, text_y):
    """A box with a title at its top, and text around text_y."""
    patch = FancyBboxPatch(
        (x, y),
        width,
        height,
        boxstyle="round,pad=0,rounding_size=14",
        linewidth=1.8,
        facecolor=color + "16",
        edgecolor=color,
    )
    axis.add_patch(patch)
    write_bold(x + width / 2, y + 28, title, color)
    write(x + width / 2, text_y, text)


def blocks(x, y, height, color):
    """The 12 blocks of an encoder."""
    for i in range(12):
        block = Rectangle((x + 20 * i, y), 14, height, facecolor=color, alpha=0.75, linewidth=0)
        axis.add_patch(block)


def arrow(points, color=INK, **options):
    """A line through the points (x, y) with a head at the last."""
    axis.plot(*zip(*points), color=color, linewidth=1.8, **options)
    x0, y0 = points[-2]
    x, y = points[-1]
    marker = ">"
    if y > y0:
        marker = "v"
    if y < y0:
        marker = "^"
    axis.plot(x, y, marker, color=color, markersize=9)


def right(x, to, y, color=INK):
    """An arrow to the right."""
    arrow([(x, y), (to, y)], color)


def picture(x, y, width, height, image, cmap=VIRIDIS, edge=INK, zorder=2, vmin=None, vmax=None):
    """An image in a frame, divided into patches; grey where it is masked."""
    axis.imshow(
        image,
        cmap=cmap.with_extremes(bad=MASKED),
        vmin=vmin,
        vmax=vmax,
        extent=(x, x + width, y + height, y),
        aspect="auto",
        interpolation="nearest",
        zorder=zorder,
    )
    columns, rows = GRID
    style = dict(colors="#ffffff60", linewidth=0.5, zorder=zorder)
    axis.vlines([x + width * i / columns for i in range(1, columns)], y, y + height, **style)
    axis.hlines([y + height * i / rows for i in range(1, rows)], x, x + width, **style)
    frame = Rectangle((x, y), width, height, fill=False, edgecolor=edge, linewidth=1.2, zorder=zorder)
    axis.add_patch(frame)


# ----- The picture -----------------------------------------------------------------------------------------


def draw_teacher(drawn: Drawn) -> None:
    """The upper path: from the clip to its targets."""
    write_bold(240, 62, "a clip: log-mel spectrogram")
    picture(30, 90, 420, 160, drawn.spec, MAGMA, **RANGE)
    write(240, 276, "10 s: 64 × 8 patches (time × mel)", GREY)
    write(432, 162, "padding", size=9.5, va="center", rotation=90)
    right(450, 508, 170)
    text = "12 transformer blocks\nsee all 512 patches"
    box(520, 40, 280, 262, TEACHER, "TEACHER", text, 258)
    blocks(543, 94, 86, TEACHER)
    axis.vlines([550 + 20 * i for i in range(12)], 180, 206, TEACHER, linewidth=1.2)
    right(550, 853, 206, TEACHER)
    text = "normalise each of the 12\nfeed-forward outputs,\nthen average them"
    box(865, 88, 320, 164, TEACHER, "make_targets", text, 186)
    right(1185, 1238, 170, TEACHER)
    write_bold(1492, 62, "targets Y: one vector per patch", TEACHER)
    picture(1250, 90, 485, 160, drawn.targets, edge=TEACHER)


def draw_student(drawn: Drawn) -> None:
    """The lower path: masks, student, decoder."""
    arrow([(60, 302), (60, 588)])
    write(80, 446, "16 inverse-\nblock masks,\neach hides 410\nof 512 patches", ha="left")
    for i, mask in enumerate(drawn.masks):
        shown = drawn.spec.masked_fill(enlarge(mask), torch.nan)
        picture(66 - 12 * i, 600 + 40 * i, 384, 140, shown, MAGMA, zorder=2 + i / 10, **RANGE)
    write(240, 886, "16 masked copies of the clip (4 shown)", GREY)
    right(450, 508, 730)
    text = "12 blocks see 102\npatches + cls_token"
    box(520, 590, 280, 290, STUDENT, "STUDENT", text, 838)
    blocks(543, 646, 144, STUDENT)
    right(800, 853, 770, STUDENT)
    text = "tokens back on the grid,\nnoise at masked places,\nthen 6 convolutions"
    box(865, 655, 320, 225, DECODER, "DECODER (CNN)", text, 822)
    columns, rows = GRID
    is_masked = drawn.masks[-1][:, :, None]                                    # (W, H, 1)
    noise = torch.rand(rows, columns, 1).mul(0.25).add(0.7).expand(-1, -1, 3)  # (W, H, 3)
    tokens = torch.tensor(matplotlib.colors.to_rgb(STUDENT))                   # (3,)
    picture(887, 704, 276, 64, torch.where(is_masked, noise, tokens), edge=DECODER)
    right(1185, 1238, 770, DECODER)
    prediction = VIRIDIS(drawn.prediction) * is_masked.numpy()                 # (W, H, 4)
    picture(1250, 690, 485, 160, prediction, edge=DECODER)
    write_bold(1492, 880, "prediction, sketched", DECODER)


def draw_losses() -> None:
    """Between them: what is compared, and what is updated."""
    arrow([(1284, 250), (1284, 345), (1025, 345), (1025, 393)], TEACHER)
    write(1154, 323, "mean over patches", TEACHER)
    arrow([(1492, 250), (1492, 393)], TEACHER)
    for x in (1284, 1492):
        axis.hlines([280, 290], x - 14, x + 14, LOSS, linewidth=2.4, zorder=4)
    write(1388, 285, "stop-gradient", LOSS)
    arrow([(800, 622), (1025, 622), (1025, 537)], STUDENT)
    write(915, 600, "cls_token", STUDENT)
    arrow([(1492, 690), (1492, 537)], DECODER)
    box(865, 405, 320, 120, LOSS, "utterance loss", "utterance_weight ×\n(cls_token − mean of Y)²", 484)
    text = "(prediction − Y)²\nat the masked patches"
    box(1332, 405, 320, 120, LOSS, "frame loss", text, 484)
    write_bold(1258, 468, "+", LOSS, 24)
    arrow([(1652, 465), (1768, 465), (1768, 940), (660, 940), (660, 892)], LOSS)
    arrow([(1025, 940), (1025, 892)], LOSS)
    text = "the gradient of the sum (+) updates student and decoder: one AdamW step"
    write(1231, 970, text, LOSS)
    arrow([(660, 590), (660, 314)], TEACHER, linestyle=(0, (5, 3)))
    text = "moving average (EMA)\nafter each update:"
    write(640, 401, text, TEACHER, ha="right")
    text = "teacher ← d · teacher\n+ (1 − d) · student,\nd = ema_decay ≥ 0.9998"
    write(640, 476, text, TEACHER, ha="right")


def draw_numbers() -> None:
    """The order in which an update computes all this."""
    steps = [
        (520, 40, TEACHER),
        (520, 590, STUDENT),
        (865, 655, DECODER),
        (745, 970, LOSS),
        (660, 340, TEACHER),
    ]
    for number, (x, y, color) in zip((1, 2, 3, 4, 4), steps):
        axis.plot(x, y, "o", color=color, markersize=15, zorder=4)
        write_bold(x, y, str(number), "white", 11, zorder=5)


def main() -> None:
    drawn = compute()
    draw_teacher(drawn)
    draw_student(drawn)
    draw_losses()
    draw_numbers()
    file = BytesIO()
    figure.savefig(file)
    image = Image.open(file).convert("RGB").quantize(256, dither=0)
    image.save(ROOT / "extras/method.png", optimize=True)


if __name__ == "__main__":
    main()
