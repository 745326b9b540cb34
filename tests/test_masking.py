"""Masks: exact counts, the released generator's statistics, block shapes, and the tokens that they choose."""

from pathlib import Path

import numpy as np
import pytest
import torch

from masking import (
    FLEXIBLE_BLOCKS,
    count_visible,
    flexible_block_mask,
    inverse_block_mask,
    visible_ids,
)
from model import EAT, MODELS

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
        spread = torch.stack(around).amin(0) * visible
        if torch.equal(spread, labels):
            return ((labels == first) & visible).sum((1, 2))
        labels = spread


def assert_same_mean(ours: torch.Tensor, theirs: torch.Tensor):
    """Means over rows agree within 4 standard errors, in every column."""
    ours, theirs = ours.double(), theirs.double()
    error = (ours.var(0) / len(ours) + theirs.var(0) / len(theirs)).sqrt()
    z = (ours.mean(0) - theirs.mean(0)) / error.clamp(min=1e-12)
    assert z.abs().max() < 4, z.abs().max()


@pytest.mark.parametrize("setting", SETTINGS)
def test_statistics_of_the_released_generator(setting):
    theirs = torch.from_numpy(np.unpackbits(np.load(GOLDEN)[setting], axis=1)).bool()
    ours = inverse_block_mask(50_000, **SETTINGS[setting], generator=seeded())
    assert len(set((~theirs).sum(1).tolist()) | set((~ours).sum(1).tolist())) == 1
    ours, theirs = ((~mask).view(-1, 64, 8) for mask in (ours, theirs))
    assert_same_mean(ours.flatten(1), theirs.flatten(1))
    for pairs in (lambda v: v[:, 1:] & v[:, :-1], lambda v: v[:, :, 1:] & v[:, :, :-1]):
        assert_same_mean(pairs(ours).sum((1, 2)), pairs(theirs).sum((1, 2)))
    assert_same_mean(components(ours[:2000]), components(theirs))


@pytest.mark.parametrize("grid", [(64, 8), (32, 8), (16, 8)])
@pytest.mark.parametrize("mask_ratio", [0.75, 0.8])
def test_exact_count(grid, mask_ratio):
    expected = int(grid[0] * grid[1] * (1 - mask_ratio))
    assert count_visible(grid[0] * grid[1], mask_ratio) == expected
    for mask in (
        inverse_block_mask(500, grid, mask_ratio, generator=seeded()),
        random_mask(500, grid=grid, mask_ratio=mask_ratio, generator=seeded()),
        flexible_block_mask(100, 5, grid, mask_ratio, generator=seeded()),
    ):
        assert mask.shape == (500, grid[0] * grid[1]) and mask.dtype == torch.bool
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
    grid, area = (64, 8), block[0] * block[1]
    mask = inverse_block_mask(
        2000, grid, mask_ratio=1 - (area + 0.5) / 512, block=block, adjust=0.0, generator=seeded()
    )
    whole = fits(mask, block, grid)
    inside = (64 - block[0] + 1) * (8 - block[1] + 1) / 512  # share of the centres whose block is not cut
    assert whole.float().mean() == pytest.approx(inside, abs=0.05)
    assert ((~mask).sum(1) == area).all()


def test_blocks_of_one_patch_are_random_masks():
    """Every patch is as often visible as any other, and so is every pair of neighbours: chance alone."""
    visible = torch.cat([~random_mask(1000, generator=seeded(i)).view(-1, 64, 8) for i in range(20)])
    p, pairs = 102 / 512, 102 * 101 / (512 * 511)
    z = (visible.double().mean(0) - p) / (p * (1 - p) / len(visible)) ** 0.5
    assert z.abs().max() < 4.5
    for both in (visible[:, 1:] & visible[:, :-1], visible[:, :, 1:] & visible[:, :, :-1]):
        assert both.double().mean().item() == pytest.approx(pairs, rel=0.01)


def test_flexible_shape_is_shared_by_the_clones_of_a_clip():
    masks = flexible_block_mask(60, 8, mask_ratio=1 - 25.5 / 512, adjust=0.0, generator=seeded())
    which = torch.stack([fits(masks, block, (64, 8)) for block in FLEXIBLE_BLOCKS], dim=-1).view(60, 8, 3)
    of_clip = which.any(1)  # a block at the border is cut, so not every clone shows its shape
    assert of_clip.sum(1).max() == 1 and of_clip.any(0).all()


def test_same_generator_same_masks():
    for draw in (inverse_block_mask, random_mask):
        assert torch.equal(draw(9, generator=seeded(1)), draw(9, generator=seeded(1)))
        assert not torch.equal(draw(9, generator=seeded(1)), draw(9, generator=seeded(2)))


def test_the_model_takes_and_puts_the_same():
    """Encoder and decoder index flat, which is faster; what they return is that of take and put."""
    torch.manual_seed(0)
    eat, spec = EAT(MODELS["tiny"]), torch.randn(2, 1, 64, 128)
    mask = random_mask(6, grid=(4, 8), generator=seeded())
    ids_keep = visible_ids(mask, count_visible(32, 0.8))
    with torch.no_grad():
        patches = eat.encoder.patch_embed(spec).flatten(2).transpose(1, 2) + eat.encoder.pos_embed[:32]
        taken = take(patches.repeat_interleave(3, dim=0), ids_keep)
        expected = eat.encoder.norm_pre(torch.cat([eat.encoder.cls_token.expand(6, -1, -1), taken], dim=1))
        torch.testing.assert_close(eat.encoder.embed(spec, ids_keep), expected)
        noise = torch.randn(6, 32, 64)
        grid = put(taken, ids_keep, noise)
        everything = torch.arange(32).expand(6, -1)
        ours = eat.decoder(taken, ids_keep, noise, (4, 8))
        torch.testing.assert_close(ours, eat.decoder(grid, everything, torch.zeros_like(noise), (4, 8)))


def test_take_and_put_are_inverse():
    mask = inverse_block_mask(6, generator=seeded())
    ids_keep = visible_ids(mask, 102)
    assert (ids_keep.diff(dim=1) > 0).all() and not mask.gather(1, ids_keep).any()
    x, fill = torch.randn(6, 512, 7, generator=seeded()), torch.zeros(6, 512, 7)
    back = put(take(x, ids_keep), ids_keep, fill)
    assert torch.equal(back, x * ~mask[:, :, None])


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(grid=(8, 8), block=(9, 3)), "8 x 8 patches .* 0 blocks of 9 x 3: choose a smaller block"),
        (dict(grid=(8, 8), block=(5, 5)), "12 visible and room for 0 blocks of 5 x 5: choose"),
        (dict(block=(0, 5)), "0 blocks of 0 x 5"),
        (dict(grid=(1, 4), block=(1, 1)), "1 x 4 patches at mask ratio 0.8 has 0 visible"),
        (dict(mask_ratio=1.0), "mask ratio 1.0 has 0 visible"),
        (dict(mask_ratio=0.0), "mask ratio 0.0 has 0 visible"),
        (dict(mask_ratio=-1.0), "mask ratio -1.0 has 0 visible"),
        (dict(mask_ratio=float("nan")), "mask ratio nan has 0 visible"),
        (dict(mask_ratio=float("-inf")), "mask ratio -inf has 0 visible"),
    ],
)
def test_impossible_masks_are_refused(kwargs, message):
    """One message says what is impossible and what to change."""
    with pytest.raises(ValueError, match=message) as error:
        inverse_block_mask(2, **kwargs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mask_ratio", [1.0, 0.0])
def test_impossible_flexible_masks_are_refused(mask_ratio):
    """A grid or ratio without room for every one of the shapes is refused, whichever would be drawn."""
    with pytest.raises(ValueError, match="has 0 visible"):
        flexible_block_mask(2, 2, mask_ratio=mask_ratio)
    with pytest.raises(ValueError, match="blocks of 6 x 4: choose"):
        flexible_block_mask(2, 2, grid=(4, 8))
