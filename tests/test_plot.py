"""Pictures: what is drawn, into which file, and what is refused."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, tone

from data import InputError, clip_samples, load_audio, spectrogram
from evaluate import save_checkpoint
from model import MODELS, AudioClassifier, Encoder, ModelConfig

pytest.importorskip("matplotlib")
from extras import plot  # noqa: E402


@pytest.fixture
def runs(classifier):
    """The folder of clips with a classifier, and two runs in it."""
    for name, faster in (("run", 1), ("other", 2)):
        records = []
        for step in (1, 2, 3):
            records.append(dict(step=step, loss=5.0 / step / faster, lr=1e-3, target_std=0.9))
        records.append(dict(step=3, accuracy=0.3 * faster))
        (classifier / name).mkdir()
        write_log(classifier / name, records)
    soundfile.write(classifier / "short.wav", tone(2960).numpy(), 16_000)  # 17 frames: one patch
    return classifier


def write_log(run: Path, records: list[dict]) -> None:
    (run / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def title(figure) -> list[str]:
    """The lines above a picture."""
    return figure.get_suptitle().split("\n")


@pytest.mark.parametrize("args", [
    ["run"],
    ["run", "other"],
    ["clip 7.wav"],
    ["short.wav"],
    ["clip 7.wav", "--timeline", "classifier.pt"],
    ["clip 7.wav", "--timeline", "classifier.pt", "--hop", "0.25"],
    ["clip 7.wav", "--checkpoint", "classifier.pt", "--attention"],
])  # fmt: skip
def test_pictures(runs, called, args):
    """Each kind of input makes a picture, and its name is printed."""
    assert called(plot, *args, "-o", "out.png").stdout == "out.png\n"
    assert (runs / "out.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# --- curves -----------------------------------------------------------------------------------------------


def test_curves_show_what_the_logs_hold(runs, monkeypatch):
    """A panel for each kind of quantity, a line for each run, with the log's numbers; all of the same span,
    so that a single evaluation is a point where it was made."""
    monkeypatch.chdir(runs)
    axes = {axis.get_ylabel(): axis for axis in plot.plot_curves(["run", "other"]).axes}
    assert set(axes) == {"loss", "standard deviation", "score", "learning rate"}
    lines = [line.get_xydata().tolist() for line in axes["loss"].get_lines()]
    assert lines == [[[1, 5], [2, 2.5], [3, 5 / 3]], [[1, 2.5], [2, 1.25], [3, 2.5 / 3]]]
    assert [line.get_xydata().tolist() for line in axes["score"].get_lines()] == [[[3, 0.3]], [[3, 0.6]]]
    for axis in axes.values():
        assert axis.get_xlim() == pytest.approx((0, 3.09))
    assert axes["score"].get_ylim()[0] == 0 < axes["score"].get_ylim()[1] < 1
    assert axes["loss"].get_yscale() == "log"


def test_curves_pass_over_foreign_and_damaged_lines(runs, monkeypatch, capsys):
    """Whatever is written into a log, what a run wrote is drawn, and the rest is counted."""
    monkeypatch.chdir(runs)
    log = runs / "run" / "log.jsonl"
    own = log.read_bytes()
    foreign = [
        b"note: the disk was full here", b'{"step": 2, "loss": 2.', b"\xff\x00\xfe", b"[1, 2]", b"3",
        b"null", b"", b'{"loss": 1.0}', b'{"step": "two", "loss": 1.0}', b'{"step": NaN, "loss": 1.0}',
        b"[" * 100_000,
    ]  # fmt: skip
    odd = b'{"step": 2, "loss": "low", "lr": null, "accuracy": NaN, "mAP": [1], "target_std": true}'
    log.write_bytes(b"\n".join([*foreign, odd]) + b"\n" + own)
    figure = plot.plot_curves(["run"])
    axes = {axis.get_ylabel(): axis for axis in figure.axes}
    assert set(axes) == {"loss", "standard deviation", "score", "learning rate"}
    assert axes["loss"].get_lines()[0].get_xydata().tolist() == [[1, 5], [2, 2.5], [3, 5 / 3]]
    assert axes["score"].get_lines()[0].get_xydata().tolist() == [[3, 0.3]]
    said = capsys.readouterr().err
    assert said == f"WARNING: run/log.jsonl: passed over {len(foreign)} damaged lines\n"
    log.write_bytes(own)
    plot.plot_curves(["run"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("names", [["run"], ["run", "other"]])
def test_legends_cover_nothing_and_runs_are_named(runs, monkeypatch, names):
    """Above the panel or below all of them; of runs in folders of the same name, which is which."""
    monkeypatch.chdir(runs)
    Path("a_$^$").mkdir()
    for name in names:
        Path(name).rename(f"a_$^$/{name}")
    names = [f"a_$^$/{name}" for name in names]
    figure = plot.plot_curves(names)
    figure.canvas.draw()
    for axis in figure.axes:
        legend = axis.get_legend().get_window_extent()
        panel = axis.get_window_extent()
        assert not legend.overlaps(panel)
        assert legend.x1 <= panel.x1 + 1
    texts = []
    for legend in figure.legends:
        texts += [text.get_text().replace("\\", "") for text in legend.get_texts()]
    if len(names) == 1:
        assert (title(figure), texts) == (names, [])
    else:
        assert (title(figure), texts) == ([""], names)


# --- a clip -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 3])
def test_attention_of_cls_is_what_the_last_block_computes(depth):
    """Against the softmax of all queries and keys that the last block's attention gets."""
    config = dataclasses.replace(MODELS["tiny"], depth=depth)
    encoder = Encoder(config).eval()
    spec = torch.randn(1, 1, 96, 128)
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


def test_pictures_say_which_part_of_which_file_they_show(runs, monkeypatch):
    monkeypatch.chdir(runs)
    soundfile.write("a_$^$.wav", tone(48_000).numpy(), 16_000)
    encoder = Encoder.from_pretrained("classifier.pt")
    figure = plot.plot_attention(encoder, "a_$^$.wav", "classifier.pt")
    part = "a_$^$.wav: 0:00.0 to 0:01.0 of 0:03.0"
    assert title(figure) == [part, "attention in the last block of classifier.pt"]
    assert title(plot.plot_masks("a_$^$.wav")) == [part.replace("0:01.0", "0:02.9")]
    spec, weight = (axis.images[0] for axis in figure.axes[:2])
    assert spec.get_extent() == [0, 0.96, 0, 128]
    assert weight.get_extent() == [0, 0.96, 0, 128]
    assert weight.get_array().shape == spec.get_array().shape
    assert weight.get_array().mean() < 1.001
    figure.savefig("drawn.png")  # no character of a name is taken for a formula


def test_masked_patches_are_grey_and_the_rest_is_the_clip(runs, monkeypatch):
    """A fifth of the patches is left of each copy, and shows what the clip has there."""
    monkeypatch.chdir(runs)
    soundfile.write("long.wav", tone(164_080).numpy(), 16_000)
    figure = plot.plot_masks("long.wav")
    axes = np.array(figure.axes).reshape(5, 2)
    for column in axes.T:
        whole = column[0].images[0].get_array()
        for axis in column[1:]:
            drawn = np.ma.masked_invalid(axis.images[0].get_array())
            assert (~drawn.mask).sum() == 102 * 256
            assert np.array_equal(drawn[~drawn.mask], whole[~drawn.mask])


def test_a_clip_is_cut_to_the_networks_length():
    path = ROOT / "extras" / "demo" / "prompts" / "000.opus"
    spec, seconds, part = plot.read_clip(str(path), ModelConfig(clip_frames=64))
    assert spec.shape[2] == 64
    assert seconds == pytest.approx(0.64)
    assert part.startswith(f"{path}: 0:00.0 to 0:00.6 of 0:")


def test_a_clip_shorter_than_a_patch_is_refused(tmp_path):
    soundfile.write(tmp_path / "click.wav", tone(1600).numpy(), 16_000)
    with pytest.raises(InputError, match="shorter than a patch of 160 ms"):
        plot.read_clip(str(tmp_path / "click.wav"), ModelConfig())


# --- a file -----------------------------------------------------------------------------------------------


@pytest.fixture
def timeline(runs):
    """Draws what the classifier hears in a file: (figure, its spectrogram, its table), both axes."""
    model = AudioClassifier.from_pretrained(runs / "classifier.pt")

    def draw(name: str, hop: float = 0.0):
        figure = plot.plot_timeline(model, str(runs / name), "classifier.pt", hop)
        return figure, figure.axes[0], figure.axes[1]

    return draw


def probabilities(runs: Path, waveform: torch.Tensor) -> list[float]:
    """Those of high and low in a clip of up to 0.96 s."""
    model = AudioClassifier.from_pretrained(runs / "classifier.pt")
    config = model.config
    n_samples = torch.tensor([len(waveform)])
    padded = torch.zeros(1, clip_samples(config.clip_frames))
    padded[0, : len(waveform)] = waveform
    spec = spectrogram(padded, n_samples, config.norm_mean, config.norm_std)
    with torch.no_grad():
        return model.probabilities(model(spec))[0].tolist()


def test_a_timeline_shows_every_window_below_its_spectrogram(runs, timeline):
    """Probabilities of the classes in each window, 0 in silence, as long as there is sound; both of the same
    time, one above the other."""
    sound = torch.cat([tone(96 * 160), torch.zeros(2 * 96 * 160), tone(8000)])
    soundfile.write(runs / "long.wav", sound.numpy(), 16_000)
    figure, above, axis = timeline("long.wav")
    drawn = axis.collections[0].get_array().reshape(2, 4)
    names = [label.get_text() for label in axis.get_yticklabels()]
    heard = load_audio(runs / "long.wav")
    clip = clip_samples(96)
    for column, begin in ((0, 0), (3, len(sound) - clip)):
        expected = dict(zip(["Low tone", "High tone"], probabilities(runs, heard[begin : begin + clip])))
        assert drawn[:, column].tolist() == pytest.approx([expected[name] for name in names], abs=1e-5)
    assert drawn.sum(0).tolist() == pytest.approx([1, 0, 1, 1], abs=1e-5)  # the third reaches into sound
    assert axis.get_xlim() == pytest.approx((0, len(sound) / 16_000))
    assert title(figure) == [f"{runs}/long.wav (0:03.4)", "what classifier.pt hears"]
    spec = above.images[0].get_array()
    left, right, *_ = above.images[0].get_extent()
    assert above.get_xlim() == axis.get_xlim()
    assert (left, right) == pytest.approx((0, 3.38), abs=0.05)
    assert spec.shape[0] == 128
    assert spec[:, 300:].mean() > spec[:, 200:250].mean() + 0.5  # sound, silence
    figure.canvas.draw()
    upper = above.get_position()
    lower = axis.get_position()
    assert upper.y0 > lower.y1
    assert [upper.x0, upper.x1] == [lower.x0, lower.x1]


def test_windows_that_overlap_stand_for_their_middle(runs, timeline):
    soundfile.write(runs / "long.wav", tone(3 * 16_000).numpy(), 16_000)
    _, _, axis = timeline("long.wav", hop=0.5)
    edges = axis.collections[0].get_coordinates()[0, :, 0]
    assert edges[1:-2].tolist() == pytest.approx([0.73, 1.23, 1.73, 2.23])
    assert edges[-2] == pytest.approx((2 + (3 - 0.975) + 0.96) / 2)  # the last window ends with the file
    assert edges[-1] == pytest.approx(3.0, abs=0.05)
    assert axis.get_xlim() == pytest.approx((0, edges[-1]))


def test_a_timeline_of_a_part_says_so(runs, timeline):
    soundfile.write(runs / "whole.flac", tone(16_000).repeat(20).numpy(), 16_000)
    data = (runs / "whole.flac").read_bytes()
    (runs / "cut.flac").write_bytes(data[: len(data) // 2])
    figure, _, _ = timeline("cut.flac")
    said = title(figure)[0]
    assert "cut.flac (0:" in said
    assert ", heard in part: " in said


def test_the_timeline_of_a_long_file_counts_minutes(runs, timeline):
    """And its spectrogram has no more columns than can be seen."""
    soundfile.write(runs / "long.wav", tone(16_000).repeat(240).numpy(), 16_000)
    _, above, axis = timeline("long.wav")
    assert axis.get_xlabel() == "time / min"
    assert axis.get_xlim() == pytest.approx((0, 4))
    assert above.images[0].get_extent()[:2] == pytest.approx([0, 4], abs=0.01)
    assert 500 < above.images[0].get_array().shape[1] <= 1000


def test_the_ten_likeliest_classes_are_drawn_the_likeliest_on_top(runs):
    config = dataclasses.replace(MODELS["tiny"], clip_frames=96)
    names = {f"{i}": f"class {i}" for i in range(14)}
    torch.manual_seed(0)
    model = AudioClassifier(config, names)
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data = torch.arange(14.0) / 10
    state = dict(network=dataclasses.asdict(config), head=model.head_settings)
    save_checkpoint(runs / "many.pt", step=1, classifier=model.state_dict(), **state)
    model = AudioClassifier.from_pretrained(runs / "many.pt")
    axis = plot.plot_timeline(model, str(runs / "clip 7.wav")).axes[1]
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert names == [f"class {i}" for i in range(13, 3, -1)]
    drawn = axis.collections[0].get_array().reshape(10, -1)[:, 0]
    assert drawn.tolist() == pytest.approx(torch.arange(13, 3, -1).div(10).sigmoid().tolist(), abs=1e-5)
    bottom, top = axis.get_ylim()
    assert bottom > top


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("args, message", [
    (["nothing"], "no such file or run: nothing"),
    (["empty"], "cannot read empty/log.jsonl: No such file or directory"),
    (["hollow"], "cannot read hollow/log.jsonl: it holds no steps"),
    (["dull"], "the log of dull holds nothing to draw"),
    (["three.txt", "-o", "three.txt"], "cannot draw into three.txt"),
    (["clip 0.wav", "-o", "clip 0.wav"], "cannot draw into clip 0.wav"),
    (["clip 0.wav", "-o", "nowhere/x.png"], "there is no folder nowhere"),
    (["clip 0.wav", "clip 1.wav"], "several inputs must be run folders"),
    (["clip 0.wav", "--attention"], "--attention and --checkpoint go together"),
    (["clip 0.wav", "--checkpoint", "classifier.pt"], "--timeline CKPT draws classes over time"),
    (["clip 0.wav", "--checkpoint", "missing.pt", "--attention"], "there is no file missing.pt"),
    (["clip 0.wav", "--timeline", "missing.pt"], "there is no file missing.pt"),
    (["clip 0.wav", "--timeline", "classifier.pt", "--hop", "3"], "--hop 3.0: choose 0.01 to 0.96 s"),
    (["clip 0.wav", "--hop", "0.5"], "--hop is for --timeline"),
    (["hollow", "--timeline", "classifier.pt"], "hollow is a folder: --timeline and --attention draw"),
    (["three.txt"], "cannot draw the beginning of three.txt: "),
    (["silence.wav"], "cannot draw the beginning of silence.wav: silent"),
    (["silence.wav", "--timeline", "classifier.pt"], "silence.wav cannot be used: silent"),
    (["click.wav", "--timeline", "classifier.pt"], "click.wav cannot be used: too short"),
    (["silence.wav", "--checkpoint", "classifier.pt", "--attention"], "beginning of silence.wav: silent"),
])  # fmt: skip
def test_refusals_are_one_line(classifier, called, args, message):
    soundfile.write(classifier / "silence.wav", np.zeros(40_000), 16_000)
    soundfile.write(classifier / "click.wav", tone(300).numpy(), 16_000)
    (classifier / "three.txt").write_text("a\nb\nc\n")
    for name in ("empty", "hollow", "dull"):
        (classifier / name).mkdir()
    write_log(classifier / "hollow", [dict(loss=1)])
    write_log(classifier / "dull", [dict(step=1, note="x")])
    before = sorted(classifier.iterdir())
    clip = (classifier / "clip 0.wav").read_bytes()
    result = called(plot, *args, check=False)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("plot.py: ")
    assert message in result.stderr
    assert sorted(classifier.iterdir()) == before
    assert (classifier / "clip 0.wav").read_bytes() == clip


def test_without_matplotlib_the_message_says_so(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError\n")
    result = subprocess.run(
        [sys.executable, ROOT / "extras" / "plot.py", "x.wav"], text=True, capture_output=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert result.returncode == 1
    assert "pip install matplotlib" in result.stderr
    assert result.stderr.count("\n") == 1
