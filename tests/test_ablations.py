"""Flexible blocks, which only the ablations train with: as the released code draws them, and in a run."""

import json

import pytest
import torch
from conftest import ROOT
from test_masking import fits, seeded

import pretrain
from pretrain import PretrainConfig

pytest.importorskip("matplotlib")  # of extras/runs/laptop.py
import ablations  # noqa: E402
from ablations import FLEXIBLE, FLEXIBLE_BLOCKS, draw_flexible_masks, flexible_block_mask  # noqa: E402


@pytest.mark.parametrize("grid", [(64, 8), (32, 8), (16, 8)])
@pytest.mark.parametrize("mask_ratio", [0.75, 0.8])
def test_exact_count(grid, mask_ratio):
    n_patches = grid[0] * grid[1]
    mask = flexible_block_mask(100, 5, grid, mask_ratio, generator=seeded())
    assert mask.shape == (500, n_patches)
    assert mask.dtype == torch.bool
    assert ((~mask).sum(1) == int(n_patches * (1 - mask_ratio))).all()


def test_how_often_each_patch_is_visible():
    """With one block of any of the three shapes, which begins 2 patches before its centre on both axes, as in
    the released code. To blocks of 24 patches, or clipped ones, patches are added anywhere."""
    n = 20_000
    mask = flexible_block_mask(n, 1, mask_ratio=1 - 25.5 / 512, adjust=0.0, generator=seeded())
    visible = (~mask).view(n, 64, 8).double().mean(0)
    expected = torch.zeros(64, 8, dtype=torch.float64)
    for h, w in FLEXIBLE_BLOCKS:
        for t in range(64):
            for f in range(8):
                is_inside = torch.zeros(64, 8, dtype=torch.bool)
                is_inside[max(0, t - 2) : t - 2 + h, max(0, f - 2) : f - 2 + w] = True
                area = int(is_inside.sum())
                outside = (25 - area) / (512 - area)
                expected += torch.where(is_inside, 1.0, outside) / (3 * 512)
    error = (expected * (1 - expected) / n).sqrt()
    assert ((visible - expected) / error).abs().max() < 4.5


def test_shapes_of_the_released_code():
    assert FLEXIBLE_BLOCKS == ((6, 4), (5, 5), (8, 3))


def test_the_shape_is_shared_by_the_clones_of_a_clip():
    """Of one clip's clones all blocks that are not cut have one shape; each shape is drawn for some clip."""
    masks = flexible_block_mask(60, 8, mask_ratio=1 - 25.5 / 512, adjust=0.0, generator=seeded())
    shown = torch.stack([fits(masks, block, (64, 8)) for block in FLEXIBLE_BLOCKS], dim=-1).view(60, 8, 3)
    of_clip = shown.any(1)
    assert of_clip.sum(1).max() == 1
    assert of_clip.any(0).all()
    assert len(masks.unique(dim=0)) > 470  # though the places are those of each clone


@pytest.mark.parametrize("settings", [dict(mask_ratio=1.0), dict(mask_ratio=0.0), dict(grid=(4, 8))])
def test_impossible_masks_are_refused(settings):
    """A grid or ratio without room for every one of the shapes is refused, whichever would be drawn."""
    with pytest.raises(ValueError, match="have no room for 6 x 4"):
        flexible_block_mask(2, 2, **settings)


def test_masks_of_an_update_are_drawn_from_seed_and_update():
    config = PretrainConfig(data="x", model="demo", batch_size=6, clones=4, clip_frames=256)
    cpu = torch.device("cpu")
    first = draw_flexible_masks(config, 3, cpu)
    assert first.shape == (24, 128)
    assert torch.equal(draw_flexible_masks(config, 3, cpu), first)
    assert not torch.equal(draw_flexible_masks(config, 4, cpu), first)
    other = PretrainConfig(data="x", model="demo", batch_size=6, clones=4, clip_frames=256, seed=2)
    assert not torch.equal(draw_flexible_masks(other, 3, cpu), first)


@pytest.mark.long
def test_the_process_of_a_job_trains_with_flexible_blocks(folder, script, train, monkeypatch):
    """Its losses are those of a training that draws such masks, and not those of one that does not."""
    flags = "--data manifest.tsv --model tiny --clip_frames 128 --min_samples 1600 --clones 2 --batch_size 4"
    flags += " --mask_ratio 0.6 --mask_adjust 0.3 --updates 2 --warmup 1 --log_every 1 --workers 0"
    flags = flags.split()
    (folder / "extras").symlink_to(ROOT / "extras")
    (folder / "job.py").write_text(FLEXIBLE)
    script(folder / "job.py", *flags, "--out_dir", "job")
    train(*flags, "--out_dir", "plain")
    monkeypatch.setattr(pretrain, "draw_masks", draw_flexible_masks)
    train(*flags, "--out_dir", "flexible")
    losses = {}
    for name in ("job", "plain", "flexible"):
        log = (folder / name / "log.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in log]
    assert len(losses["job"]) == 2
    assert losses["job"] == losses["flexible"]
    assert losses["job"] != losses["plain"]


def test_only_the_flexible_job_draws_them(tmp_path, monkeypatch):
    """The others are pretrain.py as it is."""
    seen = {}
    monkeypatch.setattr(ablations, "run_pretrain", lambda *args: seen.update({args[1].name: args[-1]}))
    jobs = ablations.list_jobs(tmp_path / "audio", tmp_path / "runs")
    for name in ("flexible-1", "base-1", "random-2", "blocks3-1"):
        jobs[name].work()
    assert seen == {"flexible-1": FLEXIBLE, "base-1": "", "random-2": "", "blocks3-1": ""}
