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


def count_visible(n_patches: int, mask_ratio: float) -> int:
    """Number of visible patches, 102 of 512 at ratio 0.8, in the released code's float arithmetic."""
    return int(n_patches * (1 - mask_ratio))


def inverse_block_mask(
    n: int,
    grid: tuple[int, int] = (64, 8),
    mask_ratio: float = 0.8,
    block: tuple[int, int] = (5, 5),
    adjust: float = 0.07,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw n masks that keep a few blocks visible: (n, H*W) bool, True = masked, the same number in each row.

    Paper Sec. 3.3; algorithm of the released code (utils/data_utils.py:211-387): a fixed number of centres,
    drawn with replacement; blocks are clipped at the edges of the grid; then patches are added or dropped at
    random. Blocks of 1 x 1 are random masks, as in MAE.

    Args:
        grid: patches in (time, frequency).
        mask_ratio: fraction of patches to hide.
        block: size of a visible block in patches, (time, frequency).
        adjust: extra area drawn to make up for overlapping and clipped blocks.
        generator, device: used to draw the masks; nothing is copied between CPU and GPU.
    Raises:
        ValueError: the block is larger than the grid, or no block or patch would be visible.
    """
    H, W = grid
    h, w = block
    if not (0 < mask_ratio < 1 and 0 < h <= H and 0 < w <= W):
        raise ValueError(f"no masks of ratio {mask_ratio} with blocks of {h} x {w} fit {H} x {W} patches")
    n_visible = count_visible(H * W, mask_ratio)
    n_blocks = int(H * W * ((1 - mask_ratio + adjust) / (h * w)))
    if not 0 < n_visible < H * W or n_blocks < 1:
        raise ValueError(
            f"{H} x {W} patches at mask ratio {mask_ratio} leave {n_visible} visible, room for "
            f"{n_blocks} blocks of {h} x {w}: choose a smaller block, longer clips or another ratio"
        )
    center = torch.randint(H * W, (n, n_blocks, 1), generator=generator, device=device)  # (n, K, 1)
    from_top = torch.arange(H, device=device) - center // W + h // 2                   # (n, K, H)
    from_left = torch.arange(W, device=device) - center % W + w // 2                   # (n, K, W)
    in_rows = ((from_top >= 0) & (from_top < h)).float()                               # (n, K, H)
    in_cols = ((from_left >= 0) & (from_left < w)).float()                             # (n, K, W)
    in_block = torch.einsum("nkh,nkw->nhw", in_rows, in_cols).clamp(max=1).flatten(1)  # (n, H*W) in {0, 1}
    noise = torch.rand(in_block.shape, generator=generator, device=device)
    keep = (in_block + noise).topk(n_visible, dim=1, sorted=False).indices             # (n, V), blocks first
    return torch.ones_like(in_block, dtype=torch.bool).scatter_(1, keep, False)        # (n, H*W)


def visible_ids(mask: Tensor, n_visible: int) -> Tensor:
    """Indices of the visible patches, ascending: (n, N) bool -> (n, V).
    V is an argument, because counting would make the CPU wait for the GPU."""
    return mask.byte().argsort(dim=1, stable=True)[:, :n_visible]


if __name__ == "__main__":
    for block in ((5, 5), (3, 8), (1, 1)):
        mask = inverse_block_mask(1, block=block)
        print(f"\nblocks of {block}: {int((~mask).sum())} of 512 patches visible ('.'); time to the right")
        for row in mask.view(64, 8).T.flip(0):  # low frequencies at the bottom
            print(" ".join("#" if cell else "." for cell in row.tolist()))
