"""Which patches the student sees: inverse block masking (EAT paper, Sec. 3.3).

A spectrogram is cut into a grid of H x W patches (time x frequency, 64 x 8 for 10 s). Instead of hiding
random patches, EAT hides everything *except* a few blocks: it draws some centres, keeps a block around each,
then adds or drops single patches at random until exactly `n_visible` are left. Each clip gets C such masks
(its clones; the paper's "multi-mask"), so that one pass of the teacher serves C passes of the student.

    time ->
    . . . . # # # # # # # # # # # #        '.' visible: the student's encoder sees these patches
    . . . . # # # # # # # # # # # #        '#' masked: the decoder predicts the teacher's features here
    . . . . # # # # # # . # # # # #
    # # # # # # # # # # # # # # # #

Masks are bool, True = masked, flattened time-major: patch (t, f) is column t * W + f.
This file needs torch only and can be copied alone. `python masking.py` prints three masks.
"""

import torch
from torch import Tensor

FLEXIBLE_BLOCKS = ((6, 4), (5, 5), (8, 3))  # (time, freq); released code: utils/data_utils.py:234-274
FLEXIBLE_ANCHOR = (2, 2)  # there every shape, whatever its size, starts 2 patches before its centre


def count_visible(n_patches: int, mask_ratio: float) -> int:
    """Number of patches left visible, 102 of 512 at ratio 0.8: same float arithmetic as the released code."""
    return int(n_patches * (1 - mask_ratio))


def inverse_block_mask(
    n: int,
    grid: tuple[int, int] = (64, 8),
    mask_ratio: float = 0.8,
    block: tuple[int, int] = (5, 5),
    adjust: float = 0.07,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    anchor: tuple[int, int] | None = None,
) -> Tensor:
    """Draw n masks that keep a few blocks visible: (n, H*W) bool, True = masked, equally many in each row.

    Paper Sec. 3.3; algorithm of the released code (utils/data_utils.py:211-387): a fixed number of centres,
    drawn with replacement; blocks are cut off at the border of the grid; then patches are added or dropped at
    random. Blocks of 1 x 1 are random masks, as in MAE.

    Args:
        grid: patches in (time, frequency).
        mask_ratio: fraction of patches to hide.
        block: size of a visible block in patches, (time, frequency).
        adjust: extra area drawn to make up for overlapping and cut blocks.
        generator, device: where the masks are drawn; nothing is copied to or from the CPU.
        anchor: how many patches before its centre a block starts; default half a block.
    Raises:
        ValueError: the block is larger than the grid, or not even one is drawn, or nothing is visible.
    """
    (H, W), (h, w) = grid, block
    n_visible = count_visible(H * W, mask_ratio) if 0 < mask_ratio < 1 else 0
    fits = n_visible > 0 and 0 < h <= H and 0 < w <= W
    n_blocks = int(H * W * ((1 - mask_ratio + adjust) / (h * w))) if fits else 0
    if n_blocks < 1 or not 0 < n_visible < H * W:
        raise ValueError(
            f"a grid of {H} x {W} patches at mask ratio {mask_ratio} has {n_visible} visible and room for "
            f"{n_blocks} blocks of {h} x {w}: choose a smaller block, longer clips or another ratio"
        )
    top, left = anchor or (h // 2, w // 2)
    center = torch.randint(H * W, (n, n_blocks, 1), generator=generator, device=device)  # (n, K, 1)
    from_top = torch.arange(H, device=device) - (center // W - top)                    # (n, K, H)
    from_left = torch.arange(W, device=device) - (center % W - left)                   # (n, K, W)
    in_rows = ((from_top >= 0) & (from_top < h)).float()                               # (n, K, H)
    in_cols = ((from_left >= 0) & (from_left < w)).float()                             # (n, K, W)
    in_block = torch.einsum("nkh,nkw->nhw", in_rows, in_cols).clamp(max=1).flatten(1)  # (n, H*W) in {0, 1}
    noise = torch.rand(in_block.shape, generator=generator, device=device)
    keep = (in_block + noise).topk(n_visible, dim=1, sorted=False).indices             # (n, V), blocks first
    return torch.ones_like(in_block, dtype=torch.bool).scatter_(1, keep, False)        # (n, H*W)


def flexible_block_mask(
    n: int,
    clones: int,
    grid: tuple[int, int] = (64, 8),
    mask_ratio: float = 0.8,
    adjust: float = 0.07,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Inverse block masks with a block shape drawn for each clip: (n * clones, H*W) bool, clone-minor rows.
    The last row of the paper's Table 3; released code: the option `flexible_mask`, off in its recipes.
    Raises ValueError as `inverse_block_mask` does."""
    shapes = [
        inverse_block_mask(n * clones, grid, mask_ratio, block, adjust, generator, device, FLEXIBLE_ANCHOR)
        for block in FLEXIBLE_BLOCKS
    ]
    choice = torch.randint(len(shapes), (n, 1), generator=generator, device=device)  # (n, 1)
    choice = choice.expand(n, clones).reshape(-1)                                    # (n*C,)
    return torch.stack(shapes)[choice, torch.arange(n * clones, device=device)]      # (n*C, H*W)


def visible_ids(mask: Tensor, n_visible: int) -> Tensor:
    """Column numbers of the visible patches, ascending: (n, N) bool -> (n, V).
    V is passed in rather than counted, so that a GPU need not tell the CPU what it drew."""
    return mask.byte().argsort(dim=1, stable=True)[:, :n_visible]


if __name__ == "__main__":
    for name, mask in (
        ("inverse blocks, 5 x 5", inverse_block_mask(1)),
        ("inverse blocks, flexible", flexible_block_mask(1, clones=1)),
        ("random, 1 x 1", inverse_block_mask(1, block=(1, 1))),
    ):
        print(f"\n{name}: {int((~mask).sum())} of {mask.numel()} patches visible ('.'); time to the right")
        for row in mask.view(64, 8).T.flip(0):  # low frequencies at the bottom
            print(" ".join(".#"[cell] for cell in row.int().tolist()))
