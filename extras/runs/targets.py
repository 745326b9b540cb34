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


CPU = torch.device("cpu")


@torch.no_grad()
def describe(
    student: EAT, teacher: Encoder, specs: list[Tensor], config: PretrainConfig
) -> dict[str, float]:  # fmt: skip
    """The numbers of a line; specs are batches of config.batch_size clips, (B, 1, F, M)."""
    targets = []
    errors = []
    for step, spec in enumerate(specs):
        y = make_targets(teacher.ffn_outputs(spec))                # (B, N, D)
        mask = draw_masks(config, step, CPU)                       # (B*C, N)
        n_visible = count_visible(mask.shape[1], config.mask_ratio)
        ids_keep = visible_ids(mask, n_visible)                    # (B*C, V)
        noise = draw_noise(config, step, range(len(spec)), CPU)    # (B*C, N, D)
        out = student(spec, mask, ids_keep, y, noise, 0.0)
        errors.append(out["loss_frame"] / student.config.width**0.5)
        targets.append(y)
    y = torch.cat(targets)                                         # (clips, N, D)
    power = y.square().mean()
    rest = y - y.mean(0)                                           # (clips, N, D)
    left = (rest.square().mean() / power).item()
    error = (torch.stack(errors).mean() / power).item()
    clip = (y.mean(1).square().mean() / power).item()
    covariance = rest.flatten(0, 1).T.cov()                        # (D, D)
    eigenvalues = torch.linalg.eigvalsh(covariance).clamp(min=1e-12)
    p = eigenvalues / eigenvalues.sum()
    rank = (-(p * p.log()).sum()).exp().item()
    return dict(place=1 - left, error=error, beyond=1 - error / left, rank=rank, clip=clip)


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("data", help="manifest of the audio")
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--clips", type=int, default=512, help="number of clips to draw from the manifest")
    args = parser.parse_args()
    first, _ = EAT.from_pretrained(args.checkpoints[0])
    network = first.config
    config = PretrainConfig(**PRESETS["demo"] | dict(batch_size=32, clip_frames=network.clip_frames))
    data = AudioDataset(args.data, config.clip_frames, config.min_samples)
    generator = torch.Generator().manual_seed(0)
    items = torch.randperm(len(data), generator=generator)[: args.clips].tolist()
    specs = []
    for i in range(0, len(items) - 31, 32):
        batch = collate([data[item] for item in items[i : i + 32]], config.clip_frames)
        specs.append(spectrogram(batch.waveform, batch.n_samples, network.norm_mean, network.norm_std))
    torch.manual_seed(1)
    untrained = EAT(network)
    print(f"{'checkpoint':40s} {'update':>6s}  place  error  beyond place  rank   clip")
    networks = {"untrained": (0, untrained, untrained.encoder)}
    for path in args.checkpoints:
        networks[path] = (load_checkpoint(path)["step"], *EAT.from_pretrained(path))
    for path, (step, student, teacher) in networks.items():
        found = describe(student, teacher, specs, config)
        print(f"{path[-40:]:40s} {step:6d}  {found['place']:5.3f}  {found['error']:5.3f}  ", end="")
        print(f"{found['beyond']:12.3f}  {found['rank']:4.0f}  {found['clip']:5.4f}")


if __name__ == "__main__":
    main()
