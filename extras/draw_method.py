"""Draw the method in one picture: python extras/draw_method.py writes extras/method.png.

The spectrogram, its masks and the targets Y are real: Y is what an untrained teacher of the small model makes
(its colour: the first principal component of the vectors). The prediction is a sketch: Y, blurred.
"""

import sys
from io import BytesIO
from pathlib import Path

import torch
import torch.nn.functional as F

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

WIDTH, HEIGHT, DPI = 1800, 1000, 150  # in pixels; these are the coordinates below, y points down
GRID = (64, 8)  # patches in time and frequency
TEACHER, STUDENT, DECODER, LOSS = "#2b6cb0", "#c05621", "#2f855a", "#b8255f"
INK, GREY, MASKED = "#1f2933", "#5b6470", "#d5d9df"
MAGMA, VIRIDIS = (matplotlib.colormaps[name] for name in ("magma", "viridis"))

figure = plt.figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI, facecolor="white")
axis = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(HEIGHT, 0))
axis.axis("off")


def as_picture(x):
    """Patches in time-major order, (n, N) -> (n, W, H): time from left to right, high frequencies on top."""
    return x.unflatten(1, GRID).transpose(1, 2).flip(1)


@torch.no_grad()
def compute():
    """Spectrogram (M, F), four masks (4, W, H), targets and prediction (W, H), all as pictures."""
    config, generator = MODELS["small"], torch.Generator().manual_seed(0)
    n_samples = clip_samples(config.clip_frames)
    waveform = load_audio(ROOT / "extras/demo/prompts/000.opus", 0, n_samples)
    padded, length = F.pad(waveform, (0, n_samples - len(waveform)))[None], torch.tensor([len(waveform)])
    spec = spectrogram(padded, length, config.norm_mean, config.norm_std)                    # (1, 1, F, M)
    torch.manual_seed(0)
    targets = make_targets(Encoder(config).ffn_outputs(spec))[0]                             # (N, D)
    component = torch.linalg.svd(targets - targets.mean(0), full_matrices=False).U[:, :1].T  # (1, N)
    targets = as_picture((component / component.std()).sigmoid())                            # (1, W, H)
    prediction = F.avg_pool2d(targets, 3, stride=1, padding=1, count_include_pad=False)
    masks = as_picture(inverse_block_mask(4, GRID, generator=generator))
    return spec[0, 0].T.flip(0), masks, targets[0], prediction[0]


def write(x, y, text, color=INK, size=10.8, ha="center", **options):
    """Lines of text around y."""
    lines = text.split("\n")
    for i, line in enumerate(lines):
        axis.text(x, y + 30 * (i - len(lines) / 2 + 0.5) + 8, line, color=color, size=size, ha=ha, **options)


def box(x, y, width, height, color, title, text, text_y):
    style = dict(boxstyle="round,pad=0,rounding_size=14", linewidth=1.8)
    axis.add_patch(FancyBboxPatch((x, y), width, height, facecolor=color + "16", edgecolor=color, **style))
    write(x + width / 2, y + 28, title, color, 13, weight="bold")
    write(x + width / 2, text_y, text)


def blocks(x, y, height, color):
    """The 12 blocks of an encoder."""
    for i in range(12):
        axis.add_patch(Rectangle((x + 20 * i, y), 14, height, facecolor=color, alpha=0.75, linewidth=0))


def arrow(*points, color=INK, **options):
    """A line through the points (x, y) with a head at the last."""
    axis.plot(*zip(*points), color=color, linewidth=1.8, **options)
    (x0, y0), (x, y) = points[-2:]
    marker = {(1, 0): ">", (0, 1): "v", (0, -1): "^"}[(x > x0) - (x < x0), (y > y0) - (y < y0)]
    axis.plot(x, y, marker, color=color, markersize=9)


def picture(x, y, width, height, image, cmap=VIRIDIS, edge=INK, zorder=2):
    """An image in a frame, divided into patches; grey where it is masked."""
    cmap, extent = cmap.with_extremes(bad=MASKED), (x, x + width, y + height, y)
    axis.imshow(image, cmap=cmap, extent=extent, aspect="auto", interpolation="nearest", zorder=zorder)
    grid = dict(colors="#ffffff60", linewidth=0.5, zorder=zorder)
    axis.vlines([x + width * i / GRID[0] for i in range(1, GRID[0])], y, y + height, **grid)
    axis.hlines([y + height * i / GRID[1] for i in range(1, GRID[1])], x, x + width, **grid)
    axis.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=edge, linewidth=1.2, zorder=zorder))


def draw(spec, masks, targets, prediction):
    # upper path: the teacher
    write(240, 62, "a clip: log-mel spectrogram", size=13, weight="bold")
    picture(30, 90, 420, 160, spec, MAGMA)
    write(240, 276, "10 s: 64 × 8 patches (time × mel)", GREY)
    write(432, 162, "padding", size=9.5, va="center", rotation=90)
    arrow((450, 170), (508, 170))
    box(520, 40, 280, 262, TEACHER, "TEACHER", "12 transformer blocks\nsee all 512 patches", 258)
    blocks(543, 94, 86, TEACHER)
    axis.vlines([550 + 20 * i for i in range(12)], 180, 206, TEACHER, linewidth=1.2)
    arrow((550, 206), (853, 206), color=TEACHER)
    text = "normalise each of the 12\nfeed-forward outputs,\nthen average them"
    box(865, 88, 320, 164, TEACHER, "make_targets", text, 186)
    arrow((1185, 170), (1238, 170), color=TEACHER)
    write(1492, 62, "targets Y: one vector per patch", TEACHER, 13, weight="bold")
    picture(1250, 90, 485, 160, targets, edge=TEACHER)

    # lower path: masks, student, decoder
    arrow((60, 302), (60, 588))
    write(80, 446, "16 inverse-\nblock masks,\neach hides 410\nof 512 patches", ha="left")
    for i, mask in enumerate(masks):
        shown = spec.masked_fill(mask.repeat_interleave(16, 0).repeat_interleave(16, 1), torch.nan)
        picture(66 - 12 * i, 600 + 40 * i, 384, 140, shown, MAGMA, zorder=2 + i / 10)
    write(240, 886, "16 masked copies of the clip", GREY)
    arrow((450, 730), (508, 730))
    box(520, 590, 280, 290, STUDENT, "STUDENT", "12 blocks see 102\npatches + cls_token", 838)
    blocks(543, 646, 144, STUDENT)
    arrow((800, 770), (853, 770), color=STUDENT)
    text = "tokens back on the grid,\nnoise at masked places,\nthen 6 convolutions"
    box(865, 655, 320, 225, DECODER, "DECODER (CNN)", text, 822)
    noise = torch.rand(GRID[1], GRID[0], 1).mul(0.25).add(0.7).expand(-1, -1, 3)
    tokens = torch.tensor(matplotlib.colors.to_rgb(STUDENT))
    picture(887, 704, 276, 64, torch.where(masks[-1][:, :, None], noise, tokens), edge=DECODER)
    arrow((1185, 770), (1238, 770), color=DECODER)
    picture(1250, 690, 485, 160, VIRIDIS(prediction) * masks[-1][:, :, None].numpy(), edge=DECODER)
    write(1492, 880, "prediction: masked patches", DECODER, 13, weight="bold")

    # between them: what is compared, and what is updated
    arrow((1284, 250), (1284, 345), (1025, 345), (1025, 393), color=TEACHER)
    write(1154, 323, "mean over patches", TEACHER)
    arrow((1492, 250), (1492, 393), color=TEACHER)
    for x in (1284, 1492):
        axis.hlines([280, 290], x - 14, x + 14, LOSS, linewidth=2.4, zorder=4)
    write(1388, 285, "stop-gradient", LOSS)
    arrow((800, 622), (1025, 622), (1025, 537), color=STUDENT)
    write(915, 600, "cls_token", STUDENT)
    arrow((1492, 690), (1492, 537), color=DECODER)
    box(865, 405, 320, 120, LOSS, "utterance loss", "(cls_token − mean of Y)²", 482)
    box(1332, 405, 320, 120, LOSS, "frame loss", "(prediction − Y)²\nat the masked patches", 484)
    write(1258, 468, "+", LOSS, 24, weight="bold")
    arrow((1652, 465), (1768, 465), (1768, 940), (660, 940), (660, 892), color=LOSS)
    arrow((1025, 940), (1025, 892), color=LOSS)
    write(1231, 970, "the gradient of the sum (+) updates student and decoder: one AdamW step", LOSS)
    arrow((660, 590), (660, 314), color=TEACHER, linestyle=(0, (5, 3)))
    write(640, 401, "moving average (EMA)\nafter each update:", TEACHER, ha="right")
    text = "teacher ← d · teacher\n+ (1 − d) · student,\nd = ema_decay ≥ 0.9998"
    write(640, 476, text, TEACHER, ha="right")
    steps = [(520, 40, TEACHER), (520, 590, STUDENT), (865, 655, DECODER), (745, 970, LOSS)]
    for number, (x, y, color) in enumerate(steps, start=1):
        axis.plot(x, y, "o", color=color, markersize=15, zorder=4)
        write(x, y, str(number), "white", 11, weight="bold", zorder=5)


if __name__ == "__main__":
    draw(*compute())
    drawn = BytesIO()
    figure.savefig(drawn)
    Image.open(drawn).convert("RGB").quantize(256, dither=0).save(ROOT / "extras/method.png", optimize=True)
