"""Which patches the student sees: inverse block masking (EAT paper, Sec. 3.3).

A spectrogram is cut into a grid of H x W patches (time x frequency, 64 x 8 for 10 s). Instead of hiding random patches,
EAT hides everything *except* a few blocks: it draws some centres, keeps a block around each, then adds or drops
single patches at random until exactly `n_visible` of them are left. Each clip gets C such masks (the clones of the
"multi-mask" of the paper), so one pass of the teacher serves C passes of the student.

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
FLEXIBLE_ANCHOR = (2, 2)  # there every shape starts 2 patches before its centre, whatever its size


def count_visible(n_patches: int, mask_ratio: float) -> int:
    """Number of patches left visible: 102 of 512 at ratio 0.8 (same float arithmetic as the released code)."""
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
    """Draw n masks that keep a few blocks visible; returns (n, H*W) bool, True = masked, the same count in every row.

    Paper Sec. 3.3; algorithm of the released code (utils/data_utils.py:211-387): a fixed number of centres, drawn
    with replacement; blocks are cut off at the border of the grid; then patches are added or dropped at random.

    Args:
        grid: patches in (time, frequency).
        mask_ratio: fraction of patches to hide.
        block: size of a visible block in patches, (time, frequency).
        adjust: extra area drawn to make up for overlapping and cut blocks.
        generator, device: where the masks are drawn; nothing is copied to or from the CPU.
        anchor: how many patches before its centre a block starts; default half a block.
    Raises:
        ValueError: the block is larger than the grid, or so large that not even one block is drawn.
    """
    (H, W), (h, w) = grid, block
    n_visible = _checked_count(grid, mask_ratio)
    if not (0 < h <= H and 0 < w <= W):
        raise ValueError(f"a {h} x {w} block does not fit a {H} x {W} grid of patches: choose a smaller block")
    n_blocks = int(H * W * ((1 - mask_ratio + adjust) / (h * w)))  # 5 at the base setting, 7 at the large one
    if n_blocks < 1:
        raise ValueError(
            f"a {h} x {w} block is too large for a {H} x {W} grid at mask ratio {mask_ratio} (not one would be drawn): "
            f"choose a smaller block, longer clips, or random masks"
        )
    top, left = anchor or (h // 2, w // 2)
    center = torch.randint(H * W, (n, n_blocks, 1), generator=generator, device=device)  # (n, K, 1)
    from_top = torch.arange(H, device=device) - (center // W - top)                      # (n, K, H)
    from_left = torch.arange(W, device=device) - (center % W - left)                     # (n, K, W)
    in_rows = ((from_top >= 0) & (from_top < h)).float()                                 # (n, K, H)
    in_cols = ((from_left >= 0) & (from_left < w)).float()                               # (n, K, W)
    in_block = torch.einsum("nkh,nkw->nhw", in_rows, in_cols).clamp(max=1).flatten(1)    # (n, H*W) in {0, 1}
    return _keep_highest(in_block, n_visible, generator)                                 # (n, H*W)


def flexible_block_mask(
    n: int,
    clones: int,
    grid: tuple[int, int] = (64, 8),
    mask_ratio: float = 0.8,
    adjust: float = 0.07,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Inverse block masks whose block shape is drawn once per clip; returns (n * clones, H*W) bool, clone-minor rows.

    Released code: the `flexible_mask` option, off in its recipes. Raises ValueError as `inverse_block_mask` does.
    """
    shapes = [
        inverse_block_mask(n * clones, grid, mask_ratio, block, adjust, generator, device, FLEXIBLE_ANCHOR)
        for block in FLEXIBLE_BLOCKS
    ]
    choice = torch.randint(len(shapes), (n, 1), generator=generator, device=device)  # (n, 1)
    choice = choice.expand(n, clones).reshape(-1)                                    # (n*C,)
    rows = torch.arange(n * clones, device=device)
    return torch.stack(shapes)[choice, rows]                                         # (n*C, H*W)


def random_mask(
    n: int,
    grid: tuple[int, int] = (64, 8),
    mask_ratio: float = 0.8,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw n masks that keep single patches at random, as in MAE; returns (n, H*W) bool, True = masked.

    The 1 x 1 row of the paper's block-size ablation.
    """
    n_visible = _checked_count(grid, mask_ratio)
    return _keep_highest(torch.zeros(n, grid[0] * grid[1], device=device), n_visible, generator)


def visible_ids(mask: Tensor, n_visible: int) -> Tensor:
    """Column numbers of the visible patches, ascending: (n, N) bool -> (n, V).

    V is passed in rather than counted, so that a GPU need not tell the CPU what it drew.
    """
    return mask.byte().argsort(dim=1, stable=True)[:, :n_visible]


def take(x: Tensor, ids_keep: Tensor) -> Tensor:
    """The visible tokens: x (n, N, D), ids_keep (n, V) -> (n, V, D)."""
    return x.gather(1, ids_keep[:, :, None].expand(-1, -1, x.shape[2]))


def put(tokens: Tensor, ids_keep: Tensor, fill: Tensor) -> Tensor:
    """The inverse of `take`: tokens (n, V, D) in their places on the grid, `fill` (n, N, D) everywhere else."""
    return fill.scatter(1, ids_keep[:, :, None].expand(-1, -1, tokens.shape[2]), tokens)


def _checked_count(grid: tuple[int, int], mask_ratio: float) -> int:
    n_visible = count_visible(grid[0] * grid[1], mask_ratio) if 0 < mask_ratio < 1 else 0
    if not 0 < n_visible < grid[0] * grid[1]:
        raise ValueError(f"mask ratio {mask_ratio} of {grid[0]} x {grid[1]} patches leaves {n_visible} visible")
    return n_visible


def _keep_highest(preferred: Tensor, n_visible: int, generator: torch.Generator | None) -> Tensor:
    """Mask all but n_visible patches, the preferred ones (1 rather than 0) first and ties at random."""
    noise = torch.rand(preferred.shape, generator=generator, device=preferred.device)
    keep = (preferred + noise).topk(n_visible, dim=1, sorted=False).indices                   # (n, V)
    return torch.ones_like(preferred, dtype=torch.bool).scatter_(1, keep, False)              # (n, N)


if __name__ == "__main__":
    for name, mask in (
        ("inverse blocks, 5 x 5", inverse_block_mask(1)),
        ("inverse blocks, flexible", flexible_block_mask(1, clones=1)),
        ("random, 1 x 1", random_mask(1)),
    ):
        print(f"\n{name}: {int((~mask).sum())} of {mask.numel()} patches visible ('.'), time from left to right")
        for row in mask.view(64, 8).T.flip(0):  # low frequencies at the bottom
            print(" ".join(".#"[cell] for cell in row.int().tolist()))
