"""Published weights by name, from a small Hub on this machine; benchmark files."""

import dataclasses
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, tone
from test_parity import GOLDEN

from data import clip_samples, spectrogram
from evaluate import save_checkpoint
from extras import listen
from model import EAT, MODELS

sys.path.insert(0, str(ROOT / "extras" / "benchmarks"))
import hear_api  # noqa: E402
import xares_encoder  # noqa: E402

REVISION = "0123456789abcdef0123456789abcdef01234567"
NAME = "someone/EAT-tiny"
NEEDS_HUB = pytest.mark.skipif(not find_spec("huggingface_hub"), reason="needs huggingface_hub")


class Hub(http.server.BaseHTTPRequestHandler):
    """One repository, with the golden folder and code in it that nobody should ask for."""

    asked: list[str] = []
    files = {path.name: path.read_bytes() for path in (GOLDEN / "hf_pretrained").iterdir()}
    files["modeling_eat.py"] = b"raise SystemExit('code of a stranger has run')"

    def do_GET(self):
        self.asked.append(self.path)
        folder, _, name = self.path.rpartition("/")
        if self.path.startswith(f"/api/models/{NAME}/"):
            files = [dict(rfilename=name) for name in self.files]
            body = json.dumps(dict(id=NAME, sha=REVISION, siblings=files)).encode()
            tag = ""
        elif folder.startswith(f"/{NAME}/resolve/") and name in self.files:
            body = self.files[name]
            tag = hashlib.sha1(body).hexdigest()
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{tag}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    """Settings of the environment under which the only Hub is ours, with an empty cache."""
    Hub.asked.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        yield dict(HF_ENDPOINT=address, HF_HOME=str(tmp_path / "cache"), HF_HUB_DISABLE_XET="1")
        server.shutdown()


def ask(tmp_path, *names: str, **environment) -> list[str]:
    """What Encoder.from_pretrained makes of names in a new process: a sum over its weights, or the error."""
    (tmp_path / "ask.py").write_text(f"""
from model import CheckpointError, Encoder
for name in {names!r}:
    try:
        print(sum(p.double().abs().sum().item() for p in Encoder.from_pretrained(name).parameters()))
    except CheckpointError as error:
        print(error)
""")
    environment = os.environ | dict(PYTHONPATH=str(ROOT)) | environment
    run = dict(cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    return subprocess.run([sys.executable, "ask.py"], **run).stdout.splitlines()


@NEEDS_HUB
@pytest.mark.long
def test_published_weights_by_name(hub, tmp_path):
    """Only settings and tensors are fetched, once; then they are there without a network too."""
    (offline,) = ask(tmp_path, NAME, **hub, HF_HUB_OFFLINE="1")  # and not yet in the cache
    assert f"no file or folder {NAME}, nor on the Hub (LocalEntryNotFoundError" in offline
    assert not Hub.asked
    (tmp_path / "mine").mkdir()
    own = str(GOLDEN / "hf_pretrained")
    paths = ("runs/typo", "mine/typo", "./no/typo")  # these are no names
    own, named, missing, *no_names = ask(tmp_path, own, NAME, "no/one", *paths, **hub)
    assert named == own
    assert float(own) > 1000
    assert missing.startswith("there is no file or folder no/one, nor on the Hub (RepositoryNotFound")
    assert no_names == [f"there is no file {path}" for path in paths]
    assert not any("typo" in path or "modeling" in path for path in Hub.asked)
    fetched = {path.rpartition("/")[2] for path in Hub.asked if path.startswith(f"/{NAME}")}
    assert fetched == {"config.json", "model.safetensors"}
    Hub.asked.clear()
    assert ask(tmp_path, NAME, **hub, HF_HUB_OFFLINE="1") == [own]
    assert not Hub.asked


def test_the_hub_is_optional(tmp_path):
    (tmp_path / "huggingface_hub.py").write_text("raise ImportError")
    cure = "to look for it on the Hugging Face Hub: pip install huggingface_hub safetensors"
    assert ask(tmp_path, NAME) == [f"there is no file or folder {NAME}; {cure}"]


# --- benchmarks -------------------------------------------------------------------------------------------


@pytest.fixture
def encoder(tmp_path) -> Path:
    """encoder.pt: an untrained encoder of clips of 0.96 s."""
    torch.manual_seed(0)
    config = dataclasses.replace(MODELS["tiny"], clip_frames=96)
    weights = EAT(config).state_dict()
    save_checkpoint(tmp_path / "encoder.pt", network=dataclasses.asdict(config), student=weights, teacher={})
    return tmp_path / "encoder.pt"


def test_the_functions_of_hear(encoder):
    """Types, sizes and times as hearbenchmark.com/hear-api.html wants them, for clips of any length."""
    model = hear_api.load_model(str(encoder))
    assert isinstance(model, torch.nn.Module)
    assert model.sample_rate == 16_000
    assert model.scene_embedding_size == model.timestamp_embedding_size == 9 * 64
    for n_samples in (300, 2_560, 15_360, 16_000, 50_000):
        audio = torch.stack([tone(n_samples), tone(n_samples, hz=1000)])
        scene = hear_api.get_scene_embeddings(audio, model)
        frames, times = hear_api.get_timestamp_embeddings(audio, model)
        T = max(1, n_samples // 2560)
        assert scene.shape == (2, 576)
        assert scene.dtype == frames.dtype == torch.float32
        assert not scene.requires_grad
        assert frames.shape == (2, T, 576)
        assert times.shape == (2, T)
        assert torch.equal(times[0], times[1])
        assert (times >= 0).all()
        assert (times <= n_samples / 16).all()
        assert torch.allclose(times.diff(), torch.tensor(160.0), atol=1)
        torch.testing.assert_close(scene, frames.mean(1))
    alone = hear_api.get_timestamp_embeddings(audio[1:], model)[0]
    torch.testing.assert_close(frames[1:], alone, rtol=1e-4, atol=1e-5)


def test_the_frames_of_hear_are_the_features_of_listen(encoder, tmp_path, called):
    """Of a file of several windows, the same tokens at the same times, of the same block."""
    soundfile.write(tmp_path / "x.wav", tone(50_000).numpy(), 16_000, subtype="FLOAT")
    model = hear_api.load_model(str(encoder))
    frames, times = hear_api.get_timestamp_embeddings(tone(50_000)[None], model)
    called(listen, encoder, "x.wav", "--features", "x.npz")
    arrays = np.load(tmp_path / "x.npz")
    assert arrays["patches"].shape == (19, 8, 64)
    torch.testing.assert_close(frames[0, :, :512].unflatten(1, (8, 64)), torch.from_numpy(arrays["patches"]))
    torch.testing.assert_close(times[0] / 1000, torch.from_numpy(arrays["times"]).float())
    torch.testing.assert_close(frames[0, ::6, 512:], torch.from_numpy(arrays["cls"]))


def test_frames_of_hear_are_tokens_of_the_block_at_seven_twelfths(encoder):
    """Of two blocks, the first; of a clip of training's length, what the encoder says."""
    model = hear_api.load_model(str(encoder))
    waveform = tone(clip_samples(96))[None]
    frames, _ = hear_api.get_timestamp_embeddings(waveform, model)
    spec = spectrogram(waveform, torch.tensor([waveform.shape[1]]), -4.268, 4.569)
    with torch.no_grad():
        x, _ = model.blocks[0](model.embed(spec))
    assert torch.equal(frames[0].reshape(6, 9, 64)[:, :8].flatten(0, 1), x[0, 1:])
    assert torch.equal(frames[0, 0, 512:], x[0, 0])


def test_an_encoder_for_xares(encoder, monkeypatch):
    """By what X-ARES does with the file: one name ends in Encoder; then its own checker, where it is."""
    monkeypatch.setenv("EAT_CHECKPOINT", str(encoder))
    names = [name for name in dir(xares_encoder) if name.endswith("Encoder")]
    assert len(names) == 1
    made = getattr(xares_encoder, names[0])()
    assert made.sampling_rate == 16_000
    assert made.hop_size_in_ms == 160
    assert made(tone(50_000)).shape == (1, 19, made.output_dim)
    with torch.no_grad():
        torch.testing.assert_close(made(tone(50_000)[None]), made(tone(50_000)))
    checker = pytest.importorskip("xares.audio_encoder_checker")
    assert checker.check_audio_encoder(made)
