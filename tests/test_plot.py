"""Pictures: what is drawn, into which file, and what is refused."""

import json
import math
import os
import subprocess
import sys

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


def test_curves_show_what_the_logs_hold(runs, monkeypatch):
    """A panel for each kind of quantity, a line for each run, with the log's numbers."""
    monkeypatch.chdir(runs)
    axes = {axis.get_ylabel(): axis for axis in plot.plot_curves(["run", "other"]).axes}
    assert set(axes) == {"loss", "standard deviation", "score", "learning rate"}
    lines = [line.get_xydata().tolist() for line in axes["loss"].get_lines()]
    assert lines == [[[1, 5], [2, 2.5], [3, 5 / 3]], [[1, 2.5], [2, 1.25], [3, 2.5 / 3]]]
    assert [line.get_xydata().tolist() for line in axes["score"].get_lines()] == [[[3, 0.3]], [[3, 0.6]]]


def test_a_timeline_shows_every_window(runs):
    """Probabilities of the classes in each window, 0 in silence, as long as there is sound."""
    sound = torch.cat([tone(96 * 160), torch.zeros(2 * 96 * 160), tone(8000)])
    soundfile.write(runs / "long.wav", sound.numpy(), 16_000)
    model = AudioClassifier.from_pretrained(runs / "classifier.pt")
    axis, _ = plot.plot_timeline(model, str(runs / "long.wav")).axes
    drawn = axis.collections[0].get_array().reshape(2, 4)
    assert axis.get_xlim() == pytest.approx((0, len(sound) / 16_000))
    assert drawn.sum(0).tolist() == pytest.approx([1, 0, 1, 1], abs=1e-5)
    assert drawn[:, 0].tolist() != drawn[:, 3].tolist()


def test_a_clip_is_cut_to_the_networks_length():
    path = ROOT / "extras" / "demo" / "prompts" / "000.opus"
    spec, seconds = plot.read_clip(str(path), ModelConfig(clip_frames=64))
    assert spec.shape[2] == 64 and seconds == pytest.approx(0.64) and clip_samples(64) == 10_480


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
        (["three.txt"], "unreadable"),
    ],
)
def test_refusals_are_one_line(classifier, called, args, message):
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
