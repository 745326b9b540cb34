"""Why loss_frame rises: what the teacher's targets are made of, and how much of it the student predicts.

    python extras/runs/targets.py OUT/pretrain.tsv runs/laptop/pretrain1/last.pt ...

A line for each checkpoint, and for its network untrained. `place`: share of the targets' variance that the
mean target of each place on the grid explains, which needs no listening. `error`: mean squared error of the
student at masked patches, loss_frame / sqrt(width). `beyond place`: share of the rest that it predicts,
1 - error / (1 - place). `rank`: effective rank of the rest, exp(entropy of its covariance's eigenvalues).
`clip`: mean square of a clip's mean target, which the CLS token predicts; that of a single target is 1.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import AudioDataset, collate, spectrogram  # noqa: E402
from masking import count_visible, visible_ids  # noqa: E402
from model import EAT, Encoder, load_checkpoint, make_targets  # noqa: E402
from pretrain import PRESETS, PretrainConfig, draw_masks, draw_noise  # noqa: E402


@torch.no_grad()
def describe(
    student: EAT, teacher: Encoder, specs: list[Tensor], config: PretrainConfig
) -> dict[str, float]:  # fmt: skip
    """The numbers of a line; specs are batches of config.batch_size clips, (B, 1, F, M)."""
    targets, errors, cpu = [], [], torch.device("cpu")
    for step, spec in enumerate(specs):
        y = make_targets(teacher.ffn_outputs(spec))  # (B, N, D)
        mask = draw_masks(config, step, cpu)  # (B*C, N)
        ids_keep = visible_ids(mask, count_visible(mask.shape[1], config.mask_ratio))  # (B*C, V)
        noise = draw_noise(config, step, range(len(spec)), cpu)
        out = student(spec, mask, ids_keep, y, noise, 0.0)
        errors.append(out["loss_frame"] / student.config.width**0.5)
        targets.append(y)
    y = torch.cat(targets)  # (clips, N, D)
    rest = y - y.mean(0)
    left = (rest.square().mean() / y.square().mean()).item()
    eigenvalues = torch.linalg.eigvalsh(rest.flatten(0, 1).T.cov()).clamp(min=1e-12)
    p = eigenvalues / eigenvalues.sum()
    error = torch.stack(errors).mean().item() / y.square().mean().item()
    rank = (-(p * p.log()).sum()).exp().item()
    clip = (y.mean(1).square().mean() / y.square().mean()).item()
    return dict(place=1 - left, error=error, beyond=1 - error / left, rank=rank, clip=clip)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("data", help="manifest of the audio")
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--clips", type=int, default=512, help="so many, drawn from the manifest")
    args = parser.parse_args()
    network = EAT.from_pretrained(args.checkpoints[0])[0].config
    config = PretrainConfig(**PRESETS["demo"] | dict(batch_size=32, clip_frames=network.clip_frames))
    data, specs = AudioDataset(args.data, config.clip_frames, config.min_samples), []
    items = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[: args.clips].tolist()
    for i in range(0, len(items) - 31, 32):
        batch = collate([data[item] for item in items[i : i + 32]], config.clip_frames)
        specs.append(spectrogram(batch.waveform, batch.n_samples, network.norm_mean, network.norm_std))
    torch.manual_seed(1)
    untrained = EAT(network)
    print(f"{'checkpoint':40s} {'update':>6s}  place  error  beyond place  rank   clip")
    for path in ("untrained", *args.checkpoints):
        known = path != "untrained"
        pair = EAT.from_pretrained(path) if known else (untrained, untrained.encoder)
        found = describe(*pair, specs, config)
        step = load_checkpoint(path)["step"] if known else 0
        print(f"{path[-40:]:40s} {step:6d}  {found['place']:5.3f}  {found['error']:5.3f}  ", end="")
        print(f"{found['beyond']:12.3f}  {found['rank']:4.0f}  {found['clip']:5.4f}")


if __name__ == "__main__":
    main()
