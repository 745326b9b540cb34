"""Pictures: what is drawn, into which file, and what is refused."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import ROOT, tone

from data import InputError, clip_samples
from model import MODELS, AudioClassifier, Encoder, ModelConfig

pytest.importorskip("matplotlib")
import plot  # noqa: E402


@pytest.mark.parametrize("depth", [1, 3])
def test_attention_of_cls_is_what_the_last_block_computes(depth):
    """Against the softmax of all queries and keys that the last block's attention gets."""
    config = ModelConfig(**vars(MODELS["tiny"]) | dict(depth=depth))
    encoder, spec = Encoder(config).eval(), torch.randn(1, 1, 96, 128)
    weight = plot.cls_attention(encoder, spec)
    captured = []
    last = encoder.blocks[-1].attn
    hook = last.register_forward_hook(lambda module, inputs, _: captured.append(inputs[0]))
    encoder(spec)
    hook.remove()
    q, k, _ = last.qkv(captured[0]).view(1, 49, 3, 2, 32).permute(2, 0, 3, 1, 4)
    expected = (q @ k.transpose(2, 3) / math.sqrt(32)).softmax(-1)[0, :, 0, 1:].mean(0)
    assert weight.shape == (6, 8)
    torch.testing.assert_close(weight.flatten(), expected)


@pytest.fixture
def runs(classifier):
    """The folder of clips with a classifier, and two runs in it."""
    for name, faster in (("run", 1), ("other", 2)):
        records = [dict(step=i, loss=5.0 / i / faster, lr=1e-3, target_std=0.9) for i in range(1, 4)]
        records += [dict(step=3, accuracy=0.3 * faster)]
        (classifier / name).mkdir()
        (classifier / name / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    soundfile.write(classifier / "short.wav", tone(2960).numpy(), 16_000)  # 17 frames: one patch
    return classifier


@pytest.mark.parametrize(
    "args",
    [
        ["run"],
        ["run", "other"],
        ["clip 7.wav"],
        ["short.wav"],
        ["clip 7.wav", "--checkpoint", "classifier.pt"],
        ["clip 7.wav", "--checkpoint", "classifier.pt", "--attention"],
    ],
)
def test_pictures(runs, called, args):
    """Each kind of input makes a picture, and its name is printed."""
    assert called(plot, *args, "-o", "out.png").stdout == "out.png\n"
    assert (runs / "out.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def title(figure) -> list[str]:
    """The lines above a picture."""
    return figure.get_suptitle().split("\n")


def test_curves_show_what_the_logs_hold(runs, monkeypatch):
    """A panel for each kind of quantity, a line for each run, with the log's numbers; all of the same span,
    so that a single evaluation is a point where it was made."""
    monkeypatch.chdir(runs)
    axes = {axis.get_ylabel(): axis for axis in plot.plot_curves(["run", "other"]).axes}
    assert set(axes) == {"loss", "standard deviation", "score", "learning rate"}
    lines = [line.get_xydata().tolist() for line in axes["loss"].get_lines()]
    assert lines == [[[1, 5], [2, 2.5], [3, 5 / 3]], [[1, 2.5], [2, 1.25], [3, 2.5 / 3]]]
    assert [line.get_xydata().tolist() for line in axes["score"].get_lines()] == [[[3, 0.3]], [[3, 0.6]]]
    assert all(axis.get_xlim() == pytest.approx((0, 3.09)) for axis in axes.values())
    assert axes["score"].get_ylim() == pytest.approx((0, 1.02)) and axes["loss"].get_yscale() == "log"


@pytest.mark.parametrize("names", [["run"], ["run", "other"]])
def test_legends_cover_nothing_and_runs_are_named(runs, monkeypatch, names):
    """Above the panel or below all of them; of runs in folders of the same name, which is which."""
    monkeypatch.chdir(runs)
    for name in names:
        Path("a_$^$").mkdir(exist_ok=True)
        Path(name).rename(f"a_$^$/{name}")
    names = [f"a_$^$/{name}" for name in names]
    figure = plot.plot_curves(names)
    figure.canvas.draw()
    for axis in figure.axes:
        legend, panel = axis.get_legend().get_window_extent(), axis.get_window_extent()
        assert not legend.overlaps(panel) and legend.x1 <= panel.x1 + 1
    texts = [text.get_text().replace("\\", "") for legend in figure.legends for text in legend.get_texts()]
    assert (title(figure), texts) == ((names, []) if len(names) == 1 else ([""], names))


def test_a_timeline_shows_every_window_below_its_spectrogram(runs):
    """Probabilities of the classes in each window, 0 in silence, as long as there is sound; both of the same
    time, one above the other."""
    sound = torch.cat([tone(96 * 160), torch.zeros(2 * 96 * 160), tone(8000)])
    soundfile.write(runs / "long.wav", sound.numpy(), 16_000)
    model = AudioClassifier.from_pretrained(runs / "classifier.pt")
    figure = plot.plot_timeline(model, str(runs / "long.wav"), "classifier.pt")
    above, axis, *_ = figure.axes
    drawn = axis.collections[0].get_array().reshape(2, 4)
    assert axis.get_xlim() == pytest.approx((0, len(sound) / 16_000))
    assert drawn.sum(0).tolist() == pytest.approx([1, 0, 1, 1], abs=1e-5)
    assert drawn[:, 0].tolist() != drawn[:, 3].tolist()
    assert title(figure) == [f"{runs}/long.wav (0:03.4)", "what classifier.pt hears"]
    spec, (left, right, *_) = above.images[0].get_array(), above.images[0].get_extent()
    assert above.get_xlim() == axis.get_xlim() and (left, right) == pytest.approx((0, 3.38), abs=0.05)
    assert spec.shape[0] == 128 and spec[:, 300:].mean() > spec[:, 200:250].mean() + 0.5  # sound, silence
    figure.canvas.draw()
    boxes = [a.get_position() for a in (above, axis)]
    assert boxes[0].y0 > boxes[1].y1 and [boxes[0].x0, boxes[0].x1] == [boxes[1].x0, boxes[1].x1]


def test_a_timeline_of_a_part_says_so(runs):
    soundfile.write(runs / "whole.flac", tone(16_000).repeat(20).numpy(), 16_000)
    data = (runs / "whole.flac").read_bytes()
    (runs / "cut.flac").write_bytes(data[: len(data) // 2])
    model = AudioClassifier.from_pretrained(runs / "classifier.pt")
    said = title(plot.plot_timeline(model, str(runs / "cut.flac")))[0]
    assert "cut.flac (0:" in said and ", heard in part: " in said


def test_the_timeline_of_a_long_file_counts_minutes(runs):
    """And its spectrogram has no more columns than can be seen."""
    soundfile.write(runs / "long.wav", tone(16_000).repeat(240).numpy(), 16_000)
    model = AudioClassifier.from_pretrained(runs / "classifier.pt")
    above, axis, *_ = plot.plot_timeline(model, str(runs / "long.wav")).axes
    assert axis.get_xlabel() == "time / min" and axis.get_xlim() == pytest.approx((0, 4))
    assert above.images[0].get_extent()[:2] == pytest.approx([0, 4], abs=0.01)
    assert 500 < above.images[0].get_array().shape[1] <= 1000


def test_pictures_say_which_part_of_which_file_they_show(runs, monkeypatch):
    monkeypatch.chdir(runs)
    soundfile.write("a_$^$.wav", tone(48_000).numpy(), 16_000)
    encoder = Encoder.from_pretrained("classifier.pt")
    figure = plot.plot_attention(encoder, "a_$^$.wav", "classifier.pt")
    part = "a_$^$.wav: 0:00.0 to 0:01.0 of 0:03.0"
    assert title(figure) == [part, "attention in the last block of classifier.pt"]
    assert title(plot.plot_masks("a_$^$.wav")) == [part.replace("0:01.0", "0:02.9")]
    spec, weight = (axis.images[0] for axis in figure.axes[:2])
    assert spec.get_extent() == weight.get_extent() == [0, 0.96, 0, 128]
    assert weight.get_array().shape == spec.get_array().shape and weight.get_array().mean() < 1.001
    figure.savefig("drawn.png")  # no character of a name is taken for a formula


def test_a_clip_is_cut_to_the_networks_length():
    path = ROOT / "extras" / "demo" / "prompts" / "000.opus"
    spec, seconds, part = plot.read_clip(str(path), ModelConfig(clip_frames=64))
    assert spec.shape[2] == 64 and seconds == pytest.approx(0.64) and clip_samples(64) == 10_480
    assert part.startswith(f"{path}: 0:00.0 to 0:00.6 of 0:")


def test_a_clip_shorter_than_a_patch_is_refused(tmp_path):
    soundfile.write(tmp_path / "click.wav", tone(1600).numpy(), 16_000)
    with pytest.raises(InputError, match="shorter than a patch of 160 ms"):
        plot.read_clip(str(tmp_path / "click.wav"), ModelConfig())


@pytest.mark.parametrize(
    "args, message",
    [
        (["nothing"], "no such file or run: nothing"),
        (["empty"], "cannot read empty/log.jsonl"),
        (["hollow"], "cannot read hollow/log.jsonl"),
        (["three.txt", "-o", "three.txt"], "cannot draw into three.txt"),
        (["clip 0.wav", "-o", "clip 0.wav"], "cannot draw into clip 0.wav"),
        (["clip 0.wav", "-o", "nowhere/x.png"], "there is no folder nowhere"),
        (["clip 0.wav", "clip 1.wav"], "several inputs must be run folders"),
        (["clip 0.wav", "--attention"], "--attention is that of a network"),
        (["clip 0.wav", "--checkpoint", "missing.pt"], "there is no file missing.pt"),
        (["three.txt"], "cannot draw the beginning of three.txt: unreadable"),
        (["silence.wav"], "cannot draw the beginning of silence.wav: silent"),
        (["silence.wav", "--checkpoint", "classifier.pt"], "silence.wav cannot be used: silent"),
        (["silence.wav", "--checkpoint", "classifier.pt", "--attention"], "beginning of silence.wav: silent"),
    ],
)
def test_refusals_are_one_line(classifier, called, args, message):
    soundfile.write(classifier / "silence.wav", torch.zeros(40_000).numpy(), 16_000)
    (classifier / "empty").mkdir()
    (classifier / "three.txt").write_text("a\nb\nc\n")
    (classifier / "hollow").mkdir()
    (classifier / "hollow" / "log.jsonl").write_text('{"loss": 1}\n')
    (classifier / "short.csv").write_text("label,name,clips,average_precision\na,A\n")
    before = sorted(classifier.iterdir()), (classifier / "clip 0.wav").read_bytes()
    result = called(plot, *args, check=False)
    assert result.returncode == 1 and result.stdout == "" and result.stderr.count("\n") == 1
    assert result.stderr.startswith("plot.py: ") and message in result.stderr
    assert before == (sorted(classifier.iterdir()), (classifier / "clip 0.wav").read_bytes())


def test_without_matplotlib_the_message_says_so(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError\n")
    result = subprocess.run(
        [sys.executable, ROOT / "extras" / "plot.py", "x.wav"], text=True, capture_output=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert result.returncode == 1 and "pip install matplotlib" in result.stderr
    assert result.stderr.count("\n") == 1
