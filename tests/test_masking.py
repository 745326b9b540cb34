"""Masks: exact counts, the released generator's statistics, block shapes, and the tokens that they choose."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from masking import count_visible, inverse_block_mask, visible_ids
from model import EAT, MODELS, sincos_2d

GOLDEN = Path(__file__).parent / "golden" / "masks.npz"
SETTINGS = {"base": dict(mask_ratio=0.8, adjust=0.07), "large": dict(mask_ratio=0.75, adjust=0.1)}


def random_mask(n: int, **kwargs) -> torch.Tensor:
    """Masks that keep single patches at random, as in MAE."""
    return inverse_block_mask(n, block=(1, 1), **kwargs)


def take(x: torch.Tensor, ids_keep: torch.Tensor) -> torch.Tensor:
    """The visible tokens: x (n, N, D), ids_keep (n, V) -> (n, V, D)."""
    return x.gather(1, ids_keep[:, :, None].expand(-1, -1, x.shape[2]))


def put(tokens: torch.Tensor, ids_keep: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    """The inverse of `take`: tokens (n, V, D) in their places, `fill` (n, N, D) everywhere else."""
    return fill.scatter(1, ids_keep[:, :, None].expand(-1, -1, tokens.shape[2]), tokens)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def components(visible: torch.Tensor) -> torch.Tensor:
    """Number of 4-connected groups of True cells in each (n, H, W) grid, by spreading the smallest label."""
    n, H, W = visible.shape
    labels = torch.arange(1, H * W + 1, dtype=torch.int16).view(1, H, W).expand(n, -1, -1) * visible
    first = labels.clone()
    while True:
        inner = torch.where(visible, labels, H * W + 1)
        padded = torch.nn.functional.pad(inner, (1, 1, 1, 1), value=H * W + 1)
        around = [
            padded[:, 1:-1, 1:-1],
            padded[:, :-2, 1:-1],
            padded[:, 2:, 1:-1],
            padded[:, 1:-1, :-2],
            padded[:, 1:-1, 2:],
        ]
        smallest = torch.stack(around).amin(0) * visible
        if torch.equal(smallest, labels):
            return ((labels == first) & visible).sum((1, 2))
        labels = smallest


def assert_same_mean(ours: torch.Tensor, theirs: torch.Tensor):
    """Means over rows agree within 4.5 standard errors, in every column: of 512, one in 300 times not."""
    ours = ours.double()
    theirs = theirs.double()
    error = (ours.var(0) / len(ours) + theirs.var(0) / len(theirs)).sqrt()
    z = (ours.mean(0) - theirs.mean(0)) / error.clamp(min=1e-12)
    assert z.abs().max() < 4.5, z.abs().max()


def neighbours_in_time(visible: torch.Tensor) -> torch.Tensor:
    return visible[:, 1:] & visible[:, :-1]


def neighbours_in_frequency(visible: torch.Tensor) -> torch.Tensor:
    return visible[:, :, 1:] & visible[:, :, :-1]


@pytest.mark.parametrize("setting", SETTINGS)
def test_statistics_of_the_released_generator(setting):
    """Each patch is as often visible as there, and as many neighbours and groups of patches are."""
    theirs = torch.from_numpy(np.unpackbits(np.load(GOLDEN)[setting], axis=1)).bool()
    ours = inverse_block_mask(12_000, **SETTINGS[setting], generator=seeded())
    assert set((~theirs).sum(1).tolist()) == set((~ours).sum(1).tolist())
    ours = (~ours).view(-1, 64, 8)
    theirs = (~theirs).view(-1, 64, 8)
    assert_same_mean(ours.flatten(1), theirs.flatten(1))
    for pairs in (neighbours_in_time, neighbours_in_frequency):
        assert_same_mean(pairs(ours).sum((1, 2)), pairs(theirs).sum((1, 2)))
    assert_same_mean(components(ours[:2000]), components(theirs))


@pytest.mark.parametrize("grid", [(64, 8), (32, 8), (16, 8)])
@pytest.mark.parametrize("mask_ratio", [0.75, 0.8])
def test_exact_count(grid, mask_ratio):
    n_patches = grid[0] * grid[1]
    expected = int(n_patches * (1 - mask_ratio))
    assert count_visible(n_patches, mask_ratio) == expected
    for block in ((5, 5), (1, 1)):
        mask = inverse_block_mask(500, grid, mask_ratio, block, generator=seeded())
        assert mask.shape == (500, n_patches)
        assert mask.dtype == torch.bool
        assert ((~mask).sum(1) == expected).all()


def test_numbers_of_the_paper():
    assert (~inverse_block_mask(3)).sum(1).tolist() == [102] * 3
    assert (~inverse_block_mask(3, mask_ratio=0.75, adjust=0.1)).sum(1).tolist() == [128] * 3


def fits(mask: torch.Tensor, block: tuple[int, int], grid: tuple[int, int]) -> torch.Tensor:
    """Whether a whole visible block of that size lies somewhere in each row."""
    visible = (~mask).float().view(-1, 1, *grid)
    return torch.nn.functional.avg_pool2d(visible, block, stride=1).amax((1, 2, 3)) > 1 - 1e-6


@pytest.mark.parametrize("block", [(2, 6), (5, 5), (6, 2), (3, 8)])
def test_one_rectangular_block(block):
    """With room for one block only, what is visible is that block, cut off at the border of the grid."""
    grid = (64, 8)
    area = block[0] * block[1]
    mask = inverse_block_mask(
        2000, grid, mask_ratio=1 - (area + 0.5) / 512, block=block, adjust=0.0, generator=seeded()
    )
    whole = fits(mask, block, grid)
    inside = (64 - block[0] + 1) * (8 - block[1] + 1) / 512  # share of the centres whose block is not cut
    assert whole.float().mean() == pytest.approx(inside, abs=0.05)
    assert ((~mask).sum(1) == area).all()


@pytest.mark.parametrize(
    "grid, block, n_visible",
    [
        ((6, 5), (3, 3), 9),
        ((6, 5), (3, 3), 5),
        ((8, 6), (4, 3), 12),
        ((8, 6), (2, 5), 11),
        ((1, 8), (1, 8), 4),
    ],
)
def test_how_often_each_patch_is_visible(grid, block, n_visible):
    """With one block: it begins half a block before its centre, which may be any patch; what is too much is
    dropped, and what is missing added, anywhere with the same probability."""
    H, W = grid
    h, w = block
    n = 20_000
    ratio = 1 - (n_visible + 0.5) / (H * W)
    adjust = h * w * 1.5 / (H * W) - (1 - ratio)  # an area of one and a half blocks: there is room for one
    mask = inverse_block_mask(n, grid, ratio, block, adjust, generator=seeded())
    visible = (~mask).view(n, H, W).double().mean(0)
    expected = torch.zeros(H, W, dtype=torch.float64)
    for t in range(H):
        for f in range(W):
            is_inside = torch.zeros(H, W, dtype=torch.bool)
            top = t - h // 2
            left = f - w // 2
            is_inside[max(0, top) : top + h, max(0, left) : left + w] = True
            area = int(is_inside.sum())
            inside = min(1.0, n_visible / area)
            outside = max(0.0, (n_visible - area) / max(1, H * W - area))
            expected += torch.where(is_inside, inside, outside) / (H * W)
    error = (expected * (1 - expected) / n).sqrt()
    assert ((visible - expected) / error).abs().max() < 4.5


def test_what_is_dropped_where_blocks_overlap():
    """A patch in two blocks is dropped as often as one in a single block: two blocks of 1 x 3 in a row of
    seven patches, of which at most three stay."""
    n = 40_000
    mask = inverse_block_mask(n, (1, 7), 1 - 3.5 / 7, (1, 3), adjust=0.4, generator=seeded())
    visible = (~mask).double().mean(0)
    expected = torch.zeros(7, dtype=torch.float64)
    for first in range(7):
        for second in range(7):
            is_inside = torch.zeros(7, dtype=torch.bool)
            is_inside[max(0, first - 1) : first + 2] = True
            is_inside[max(0, second - 1) : second + 2] = True
            area = int(is_inside.sum())
            inside = min(1.0, 3 / area)
            outside = max(0.0, (3 - area) / max(1, 7 - area))
            expected += torch.where(is_inside, inside, outside) / 49
    error = (expected * (1 - expected) / n).sqrt()
    assert ((visible - expected) / error).abs().max() < 4.5


def test_blocks_of_one_patch_are_random_masks():
    """Every patch is as often visible as any other, and so is every pair of neighbours: chance alone."""
    masks = [random_mask(1000, generator=seeded(i)) for i in range(4)]
    visible = ~torch.cat(masks).view(-1, 64, 8)
    p = 102 / 512
    pairs = 102 * 101 / (512 * 511)
    z = (visible.double().mean(0) - p) / (p * (1 - p) / len(visible)) ** 0.5
    assert z.abs().max() < 4.5
    for both in (neighbours_in_time(visible), neighbours_in_frequency(visible)):
        assert both.double().mean().item() == pytest.approx(pairs, rel=0.02)


def test_every_clip_and_clone_has_a_mask_of_its_own():
    for block in ((5, 5), (1, 1)):
        masks = inverse_block_mask(200, block=block, generator=seeded())
        assert len(masks.unique(dim=0)) == 200


def test_same_generator_same_masks():
    for draw in (inverse_block_mask, random_mask):
        assert torch.equal(draw(9, generator=seeded(1)), draw(9, generator=seeded(1)))
        assert not torch.equal(draw(9, generator=seeded(1)), draw(9, generator=seeded(2)))


def test_masks_are_drawn_from_the_given_generator_only():
    """All of it: the global generator's state does not matter, and is left alone."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = inverse_block_mask(9, generator=seeded(1))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(inverse_block_mask(9, generator=seeded(1)), first)


def test_the_model_takes_and_puts_the_same():
    """Encoder and decoder index flat, which is faster; what they return is that of take and put."""
    torch.manual_seed(0)
    eat = EAT(MODELS["tiny"])
    encoder = eat.encoder
    spec = torch.randn(2, 1, 64, 128)
    mask = random_mask(6, grid=(4, 8), generator=seeded())
    ids_keep = visible_ids(mask, count_visible(32, 0.8))
    with torch.no_grad():
        patches = encoder.patch_embed(spec).flatten(2).transpose(1, 2) + sincos_2d(4, 8, 64)
        taken = take(patches.repeat_interleave(3, dim=0), ids_keep)
        expected = encoder.norm_pre(torch.cat([encoder.cls_token.expand(6, -1, -1), taken], dim=1))
        torch.testing.assert_close(encoder.embed(spec, ids_keep), expected)
        noise = torch.randn(6, 32, 64)
        grid = put(taken, ids_keep, noise)
        everything = torch.arange(32).expand(6, -1)
        ours = eat.decoder(taken, ids_keep, noise, (4, 8))
        torch.testing.assert_close(ours, eat.decoder(grid, everything, torch.zeros_like(noise), (4, 8)))


def test_take_and_put_are_inverse():
    mask = inverse_block_mask(6, generator=seeded())
    ids_keep = visible_ids(mask, 102)
    assert (ids_keep.diff(dim=1) > 0).all()
    assert not mask.gather(1, ids_keep).any()
    x = torch.randn(6, 512, 7, generator=seeded())
    back = put(take(x, ids_keep), ids_keep, torch.zeros(6, 512, 7))
    assert torch.equal(back, x * ~mask[:, :, None])


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(grid=(8, 8), block=(9, 3)), "blocks of 9 x 3 fit 8 x 8 patches"),
        (dict(grid=(8, 8), block=(3, 9)), "blocks of 3 x 9 fit 8 x 8 patches"),
        (dict(grid=(8, 8), block=(5, 5)), "leave 12 visible, room for 0 blocks of 5 x 5: choose"),
        (dict(block=(0, 5)), "blocks of 0 x 5"),
        (dict(block=(5, 0)), "blocks of 5 x 0"),
        (dict(grid=(1, 4), block=(1, 1)), "1 x 4 patches at mask ratio 0.8 leave 0 visible"),
        (dict(mask_ratio=1.0), "no masks of ratio 1.0"),
        (dict(mask_ratio=0.0), "no masks of ratio 0.0"),
        (dict(mask_ratio=-1.0), "no masks of ratio -1.0"),
        (dict(mask_ratio=float("nan")), "no masks of ratio nan"),
        (dict(mask_ratio=float("-inf")), "no masks of ratio -inf"),
    ],
)
def test_impossible_masks_are_refused(kwargs, message):
    """One message says what is impossible and, where it is less plain, what to change."""
    with pytest.raises(ValueError, match=message) as error:
        inverse_block_mask(2, **kwargs)
    assert "\n" not in str(error.value)


def test_the_script_prints_three_masks(capsys):
    """As many '.' as it says, and a line for each of 8 bands."""
    runpy.run_path(str(ROOT / "masking.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    heads = [line for line in lines if "visible" in line]
    assert [head.partition(":")[0] for head in heads] == [f"blocks of {b}" for b in ((5, 5), (3, 8), (1, 1))]
    rows = [line for line in lines if line and "visible" not in line]
    assert len(rows) == 24
    assert sum(row.count(".") for row in rows) == 3 * 102
