"""How good is it? Metrics, predictions and probes; and how all scripts start, save and end.

    python evaluate.py CKPT eval.tsv              fine-tuned: mAP, AUC, d-prime, accuracy; a CSV of classes
    python evaluate.py CKPT train.tsv test.tsv    frozen: a linear probe of the encoder

CKPT is a run folder, a .pt file or released weights. Both run under torchrun too, with the same numbers, in
fp32 like the published scores.
"""

import argparse
import ctypes
import dataclasses
import datetime
import faulthandler
import inspect
import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import AudioDataset, InputError, Labelled, build_loader, first_line, open_labelled, spectrogram
from extras.tables import load_classifier, roc_auc, write_table
from model import CheckpointError, Encoder, ModelConfig, load_checkpoint, pool

try:
    import fcntl
except ImportError:  # Windows: run folders are not locked
    fcntl = None

# ----- Metrics ---------------------------------------------------------------------------------------------


def average_precision(scores: Tensor, targets: Tensor) -> Tensor:
    """Average precision of each class, as scikit-learn's: (n, K) scores, (n, K) 0 or 1 -> (K,) float64.
    The mean, over a class's positives, of the precision among the clips that score at least as high. A class
    without positives has 0. Raises ValueError for scores that are not finite."""
    if scores.shape != targets.shape or scores.ndim != 2 or not scores.isfinite().all():
        raise ValueError("expected finite scores and their targets, both (clips, classes)")
    result = []
    for score, target in zip(scores.T, targets.bool().T):
        everything = score.sort().values
        positives = score[target].sort().values
        hits = len(positives) - torch.searchsorted(positives, positives)  # positives at least as high
        rank = len(score) - torch.searchsorted(everything, positives)     # clips at least as high
        result.append((hits / rank.double()).sum() / max(1, len(positives)))
    return torch.stack(result)


def has_one_class(targets: Tensor) -> bool:
    """Whether every clip of targets (n, K) has exactly one class."""
    return bool((targets.sum(1) == 1).all())


def summarize_scores(scores: Tensor, targets: Tensor) -> tuple[dict, Tensor]:
    """All metrics of (n, K) scores, and the average precision of each of K classes (K,).
    mAP counts classes without positives as 0, as scikit-learn and the released code do. AUC is the mean over
    the classes that have positives and negatives; d-prime (left out if infinite) is the distance of two unit
    normal distributions with that AUC. Accuracy takes the highest score, and needs one class per clip."""
    precision = average_precision(scores, targets)
    result = dict(clips=len(scores), classes=scores.shape[1], mAP=precision.mean().item())
    auc = roc_auc(scores, targets).nanmean()
    if auc.isfinite():
        result["AUC"] = auc.item()
        if 0 < auc < 1:
            result["d_prime"] = math.sqrt(2) * torch.special.ndtri(auc).item()
    if has_one_class(targets):
        is_right = scores.argmax(1) == targets.int().argmax(1)
        result["accuracy"] = is_right.double().mean().item()
    result["classes_without_positives"] = int((targets.sum(0) == 0).sum())
    return result, precision


def spread(x: Tensor) -> float:
    """Standard deviation over rows, its mean over channels: (R, D) -> a number, near 0 after a collapse.
    The released code calls it target_var and pred_var (EAT_pretraining.py:830-845)."""
    return (x.var(0) + 1e-6).sqrt().mean().item()


# ----- Predictions -----------------------------------------------------------------------------------------


Function = Callable[[Tensor], Tensor]  # of a batch of spectrograms: (B, 1, F, M) -> (B, ...)


class Predictions(NamedTuple):
    """What `predict` returns: one row for each clip that could be read, in the order of the data set."""

    values: Tensor  # (n, ...) fp32 on the CPU
    items: Tensor  # (n,) which items of the data set these are
    problems: list[str]  # the others: file and reason


def gather(x: list) -> list:
    """The lists of all processes, one after the other."""
    if not dist.is_initialized():
        return x
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, x)
    return sum(parts, [])


@torch.no_grad()
def predict(
    function: Function, data: AudioDataset, config: ModelConfig, device: torch.device,
    workers: int = 0, batch_size: int = 32, timeout: float = 1800,
) -> Predictions:  # fmt: skip
    """Apply a function to every item of a data set once: each process handles its share, and all get all the
    results. Raises InputError if none can be read."""
    share = torch.arange(len(data))
    if dist.is_initialized():
        share = share.tensor_split(dist.get_world_size())[dist.get_rank()]
    batches = [batch.tolist() for batch in share.split(batch_size) if len(batch)]
    loader = build_loader(data, batches, workers, timeout)
    values = []
    items = []
    problems = []
    is_off = not is_first() or None  # None: off without a terminal
    for batch in tqdm(loader, "predict", len(batches), leave=False, disable=is_off):
        waveform = batch.waveform.to(device)
        spec = spectrogram(waveform, batch.n_samples.to(device), config.norm_mean, config.norm_std)
        good = [row for row, problem in enumerate(batch.problems) if not problem]  # a stand-in is not scored
        values.append(function(spec).float().cpu()[good])
        items += [batch.items[row] for row in good]
        problems += filter(None, batch.problems)
    values = torch.cat(gather(values))
    if not values.isfinite().all():
        raise InputError("the network's outputs are not finite: its training has diverged")
    return Predictions(values, torch.tensor(gather(items)), gather(problems) + data.too_short)


# ----- Probes: what a frozen encoder knows about labels it was never shown ---------------------------------

PROBE_POOLINGS = ("bands", "cls_mean")


def probe_block(config: ModelConfig, block: int = 0) -> int:
    """The block that probes see: `block`, counted from 1, or for 0 the one at 7/12 of the depth, reported as
    the best of the published weights (extras/runs/laptop/README.md). Raises InputError if there is none."""
    if not 0 <= block <= config.depth:
        raise InputError(f"there is no block {block}: the encoder has {config.depth}")
    return block or max(1, config.depth * 7 // 12)


def pooled(encoder: Encoder, pooling: str = "bands", block: int = 0) -> Function:
    """What probes see of a clip: a function for `predict`, (B, 1, F, M) -> (B, features).
    bands as in model.pool; cls_mean, as in published probes: CLS token and mean patch. Raises InputError."""
    n_blocks = probe_block(encoder.config, block)

    def features(spec: Tensor) -> Tensor:
        tokens = encoder(spec, n_blocks=n_blocks)                         # (B, 1+N, D)
        if pooling == "bands":
            return pool(tokens, spec, encoder.config, "bands")            # (B, 2*W*D)
        return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)    # (B, 2*D)

    return features


def fit_linear(x: Tensor, y: Tensor, decay: float = 1e-2) -> tuple[Tensor, Tensor]:
    """Logistic regression of classes y (n, K) 0 or 1 on features x (n, D): weight (K, D) and bias (K,).
    Softmax regression if every clip has one class, else one logistic regression per class. Features are
    standardised for the fit; the returned weights take raw features. LBFGS on all clips at once."""
    mean = x.mean(0)
    std = x.std(0, correction=0) + 1e-6
    x = (x - mean) / std
    y = y.float()
    is_single = has_one_class(y)
    weight = torch.zeros(y.shape[1], x.shape[1], device=x.device, requires_grad=True)
    bias = torch.zeros(y.shape[1], device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        scores = F.linear(x, weight, bias)              # (n, K)
        penalty = decay * weight.square().sum()
        if is_single:
            loss = F.cross_entropy(scores, y) + penalty
        else:
            loss = F.binary_cross_entropy_with_logits(scores, y) + penalty / y.shape[1]
        loss.backward()
        return loss

    optimizer.step(closure)
    weight = weight.detach().double() / std             # (K, D)
    bias = bias.detach().double() - weight @ mean.double()
    return weight.float(), bias.float()


def open_probe_sets(train: str, test: str, n_frames: int) -> tuple[Labelled, Labelled]:
    """The labelled sets to fit a probe on, and to score it on. Raises InputError."""
    train = open_labelled(train, n_frames)
    return train, open_labelled(test, n_frames, train.classes)


def probe(
    function: Function, config: ModelConfig, train: Labelled, test: Labelled,
    device: torch.device, metric: str = "", **loading,
) -> dict[str, float]:  # fmt: skip
    """Fit a linear probe to function(spec) (B, D) of one labelled set, and score it on another.
    Returns probe_linear: `metric` or, without one, accuracy if every clip has one class, else mAP."""
    fitted = predict(function, train.data, config, device, **loading)
    tested = predict(function, test.data, config, device, **loading)
    n_bad = len(fitted.problems) + len(tested.problems)
    n_cut = train.data.n_cut + test.data.n_cut
    if (n_bad or n_cut) and is_first():
        tqdm.write(f"WARNING: probes: {n_bad} clips cannot be used, {n_cut} are cut to fit", file=sys.stderr)
    y = train.targets[fitted.items].to(device)
    weight, bias = fit_linear(fitted.values.to(device), y)
    scores = F.linear(tested.values.to(device), weight, bias).cpu()
    metrics, _ = summarize_scores(scores, test.targets[tested.items])
    metric = metric or ("accuracy" if "accuracy" in metrics else "mAP")
    return dict(probe_linear=metrics[metric])


# ----- Command line ----------------------------------------------------------------------------------------


def evaluate_classifier(args: argparse.Namespace, device: torch.device) -> None:
    """Score a fine-tuned network; print the metrics, and write a table of its classes."""
    model = load_classifier(args.checkpoint, args.classes).to(device)
    test = open_labelled(args.manifest, model.config.clip_frames, model.classes)
    found = predict(model, test.data, model.config, device, args.workers, timeout=60 * args.timeout)
    probabilities = model.probabilities(found.values.double())
    metrics, precision = summarize_scores(probabilities, test.targets[found.items])
    if not is_first():
        return
    print(json.dumps(metrics | dict(unreadable=len(found.problems))))
    for problem in found.problems:
        print(f"cannot be used: {problem.expandtabs(1)}", file=sys.stderr)
    if test.data.n_cut:
        print(f"WARNING: {test.data.n_cut} longer clips are scored by their beginning", file=sys.stderr)
    counts = test.targets[found.items].sum(0)
    write_table(args.out, args.checkpoint, model, counts, precision)


def evaluate_encoder(args: argparse.Namespace, device: torch.device) -> None:
    """Fit a probe to a frozen encoder, and print its score."""
    encoder = Encoder.from_pretrained(args.checkpoint, args.teacher).to(device)
    config = encoder.config
    train, test = open_probe_sets(args.manifest, args.test, config.clip_frames)
    function = pooled(encoder, args.pooling, args.block)
    scores = probe(function, config, train, test, device, workers=args.workers, timeout=60 * args.timeout)
    if is_first():
        print(json.dumps(dict(pooling=args.pooling) | scores))


def main() -> int:
    """Do what the command line says; returns the exit status."""
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoint", help="run folder, .pt file or released weights")
    parser.add_argument("manifest", help="labelled clips: to score, or to fit a probe on")
    parser.add_argument("test", nargs="?", help="labelled clips to score the probe on")
    parser.add_argument("--classes", default="", help="class names: class_labels_indices.csv, or one a line")
    parser.add_argument("--out", default="", help="table of classes; default: RUN_FOLDER/per_class.csv")
    parser.add_argument("--pooling", choices=PROBE_POOLINGS, default="bands", help="what the probe sees")
    parser.add_argument("--block", type=int, default=0, help="the block it sees; 0 = at 7/12 of the depth")
    parser.add_argument("--teacher", action="store_true", help="probe the teacher of a pre-training run")
    parser.add_argument("--workers", type=int, default=4, help="loader threads")
    parser.add_argument("--timeout", type=float, default=30, help="minutes until a hang is an error")
    args = parser.parse_args()
    if not args.test and (args.teacher or args.block or args.pooling != "bands"):
        raise InputError("--teacher, --block and --pooling are for probes: name two manifests")
    _, _, device = init_distributed(args.timeout)
    if args.test:
        evaluate_encoder(args, device)
    else:
        evaluate_classifier(args, device)
    return 0


# ----- How all scripts start and end: settings, processes, run folders, signals, errors ---------------------

ABOVE_0 = """mask_block_time mask_block_freq clones batch_size accumulate updates epoch_clips
    log_every save_every save_minutes max_skipped timeout""".split()
FRACTIONS = """mask_ratio mask_adjust ema_decay ema_decay_end label_smoothing layer_decay mixup_prob
    specaug_freq specaug_time max_bad_fraction""".split()
BELOW_1 = "beta1 beta2 drop_path".split()


class Parser(argparse.ArgumentParser):
    """A command line whose errors are InputErrors, of one line."""

    def error(self, message: str) -> None:
        raise InputError(f"{message} (--help lists the flags)")


def check_settings(config) -> None:
    """Refuse values that cannot work. Raises InputError naming the flag."""
    for field in dataclasses.fields(config):
        name = field.name
        value = getattr(config, name)
        choices = get_args(field.type)  # of a Literal
        if choices and value not in choices:
            raise InputError(f"--{name} {value}: choose from {', '.join(choices)}")
        if isinstance(value, str) or name == "norm_mean":
            continue
        if not 0 <= value < math.inf or (name in ABOVE_0 and value == 0):
            raise InputError(f"--{name} {value} is too small or not finite")
        if (name in FRACTIONS and value > 1) or (name in BELOW_1 and value >= 1):
            raise InputError(f"--{name} {value} is too large")
    if config.warmup >= config.updates:
        raise InputError(f"--warmup {config.warmup} must be less than --updates {config.updates}")


def parse_config(cls, presets: dict[str, dict], argv: list[str] | None = None):
    """Command line -> config: flags override the preset, which overrides the defaults. Raises InputError.
    Warm-up and ema_anneal scale with --updates unless given; a preset's sets to score on are dropped if
    --data is given. --help shows every setting with the preset's default and the comment in the source."""
    parser = Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--help", action="store_true")
    parser.add_argument("--preset", choices=presets)
    defaults = dataclasses.asdict(cls())
    for name, default in defaults.items():
        if isinstance(default, bool):
            parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction)
        else:
            parser.add_argument(f"--{name}", type=type(default))
    given = vars(parser.parse_args(argv))
    preset = given.pop("preset", next(iter(presets)))
    usual = defaults | presets[preset]
    if given.pop("help", False):
        print(f"{cls.__doc__}\n\n--preset {preset}, of {', '.join(presets)}. Settings:\n")
        source = "".join(inspect.getsource(part) for part in cls.__mro__[:-1])
        for name, default in usual.items():
            comment = source.split(f"    {name}: ")[1].split("\n")[0].partition("  # ")[2]
            print(f"  --{name:17s} {default!s:13s} {comment}")
        sys.exit()
    values = usual | given
    for name in ("warmup", "ema_anneal"):
        if name in usual and name not in given:
            values[name] = usual[name] * values["updates"] // usual["updates"]
    for name in ("eval_data", "probe_train", "probe_test"):
        if name in usual and name not in given and "data" in given:
            values[name] = ""
    return cls(**values)


def init_distributed(timeout: float = 30, alone: bool = False) -> tuple[int, int, torch.device]:
    """Join the processes that torchrun started, if it did: (rank, number of processes, this one's device).
    A process that waits `timeout` minutes for the others fails, and torchrun ends the job. Raises InputError
    if the others do not come, or if this is a script for one process (`alone`)."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if alone and world > 1:
        raise InputError(f"this needs one process, but WORLD_SIZE is {world}: start it without torchrun")
    device = torch.device("cpu")
    backend = "gloo"
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise InputError(f"{torch.cuda.device_count()} GPUs here: start one process for each")
        device = torch.device("cuda", local_rank)
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32, in convolutions too
        torch.backends.cudnn.benchmark = True  # shapes are fixed
        torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass can make nan of bf16 (pytorch#196678)
    elif sys.platform == "linux":
        libc = ctypes.CDLL(None)  # keep freed memory: fresh pages cost a tenth of a small update
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    if world <= 1:
        os.environ["RANK"] = "0"  # whatever a batch system has set
        return 0, 1, device
    limit = datetime.timedelta(minutes=timeout)
    try:
        # torchrun's restarts share a store, and would find stale addresses in it (pytorch#135712)
        store, rank, _ = next(dist.rendezvous("env://", timeout=limit))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(attempt, store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    except (ValueError, RuntimeError) as error:
        others = f"the other {world - 1} processes of WORLD_SIZE (torchrun starts them)"
        raise InputError(f"could not connect to {others}: {first_line(error)}") from None
    return rank, world, device


def pick_precision(amp: str, device: torch.device) -> torch.dtype:
    """The type of --amp; auto: bf16 or else fp16 on a GPU, fp32 on a CPU."""
    if amp == "auto":
        amp = "fp32"
        if device.type == "cuda":
            amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)[amp]


def distribute(model: nn.Module) -> nn.Module:
    """The model or, among several processes, the DistributedDataParallel that averages its gradients."""
    if dist.is_initialized():
        model = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
        if not torch.cuda.is_available():
            # By default DDP regroups its buckets in the second update after each start, which changes the
            # order of sums: a resumed run would not end with the same bits. This does it before the first
            model.reducer._push_all_rebuilt_params()
    return model


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return int(os.environ.get("RANK", 0)) == 0


def open_run_folder(out_dir: Path) -> tuple[Path | None, IO]:
    """Make a run folder and lock it: (its newest checkpoint or None, the lock, which is held until it is
    closed). Raises InputError."""
    out_dir.mkdir(parents=True, exist_ok=True)
    names = os.listdir(out_dir)
    if names and "lock" not in names:
        raise InputError(f"{out_dir} is not empty and holds no run: choose another --out_dir")
    lock = open(out_dir / "lock", "w")
    try:
        if fcntl:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise InputError(f"another process is running in {out_dir}: wait for it") from None
    except OSError:
        print(f"WARNING: {out_dir} cannot be locked: start only one run in it", file=sys.stderr)
    return newest_checkpoint(out_dir), lock


def newest_checkpoint(folder: Path) -> Path | None:
    """last.pt, else previous.pt; None if there is neither. One that is damaged is renamed to .damaged."""
    for path in (folder / "last.pt", folder / "previous.pt"):
        if not path.exists():
            continue
        try:
            load_checkpoint(path)
            return path
        except CheckpointError as error:
            print(f"WARNING: {error}; renamed to {path.stem}.damaged", file=sys.stderr)
            path.rename(path.with_suffix(".damaged"))
    if any(folder.glob("*.damaged")):
        raise CheckpointError(f"no checkpoint in {folder} can be read: restore one or choose another folder")
    return None


def save_checkpoint(path: Path, **state) -> None:
    """Write a temporary file, then rename it: a checkpoint is whole or not there."""
    partial = path.with_suffix(".tmp")
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if path.name == "last.pt" and path.exists():  # keep the one before
            os.replace(path, path.with_name("previous.pt"))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class StopRequest:
    """The signal that asks this process to stop, if one has come.
    A repeat within 10 s is the same request: Slurm signals torchrun and its processes, and torchrun signals
    these again. A later one ends the process at once."""

    def __init__(self):
        self.number = 0
        self.time = 0.0

    def note(self, number: int, _) -> None:
        if not self.number:
            self.number = number
            self.time = time.monotonic()
        elif time.monotonic() > self.time + 10:
            os._exit(128 + number)  # as in shells

    def handle(self, handler) -> None:
        """Call `handler` at the next signal: `note`, or signal.SIG_DFL to end the process."""
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            if hasattr(signal, name):  # Windows lacks the last
                signal.signal(getattr(signal, name), handler)


STOP = StopRequest()


def run_script(main: Callable[[], int]) -> None:
    """Run a script and exit with its status. The user's mistakes are printed in one line, by one process:
    the others wait 5 s, in which torchrun ends them. os._exit: Python would wait for a read that hangs."""
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # any name can be printed
    if not torch.cuda.is_available() or "WORLD_SIZE" not in os.environ:  # else keep NCCL's messages
        # Keep stderr for Python: libmpg123 prints many harmless warnings, without a file name
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        torch._logging._init_logs()  # torch warns on the new stderr, too
        faulthandler.enable(sys.stderr)
    try:
        status = main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except (Exception, KeyboardInterrupt) as error:
        status = 1
        is_known = isinstance(error, (InputError, CheckpointError, OSError, KeyboardInterrupt))
        STOP.handle(signal.SIG_DFL)
        if not is_first() or (dist.is_initialized() and not is_known):
            time.sleep(5)
        if is_known:
            print(f"{Path(sys.argv[0]).name}: {first_line(error)}", file=sys.stderr)
        elif not STOP.number or not dist.is_initialized():  # else torchrun is ending this process
            traceback.print_exc()
    os._exit(status)


if __name__ == "__main__":
    run_script(main)
