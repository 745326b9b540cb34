"""The picture of the demo's tables: python extras/runs/worth.py runs/demo_table -o worth.png

A bar for each way to use the labelled clips, with the deviation over seeds and a point for each seed.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from extras.plot import plt  # noqa: E402

TUNED = "fine-tuned, pre-trained"
SCRATCH = "fine-tuned, from scratch"
PROBE = "linear probe, "
GREY = "0.75"  # not pre-trained
SHIPPED = "the encoder that\ncomes with the code"
# title of a group of bars: (label, table, its row, colour)
GROUPS = {
    "ten words, fine-tuned": [
        ("from scratch", "demo", SCRATCH, GREY),
        ("from scratch,\n4 times the updates", "scratch4", SCRATCH, GREY),
        ("4 minutes of\npre-training", "demo", TUNED, "C0"),
        (SHIPPED, "shipped", TUNED, "C0"),
    ],
    "35 words, fine-tuned": [
        ("from scratch", "words35", SCRATCH, GREY),
        (SHIPPED, "words35", TUNED, "C0"),
    ],
    "ten words, frozen, linear probe": [
        ("log-mel, without\na network", "demo", f"{PROBE}log-mel", GREY),
        ("untrained\nnetwork", "demo", f"{PROBE}random encoder", GREY),
        ("4 minutes of\npre-training", "demo", f"{PROBE}pre-trained", "C0"),
        (SHIPPED, "shipped", f"{PROBE}pre-trained", "C0"),
    ],
}


def draw(tables: dict[str, dict[str, list[float]]]):
    """`tables`: name -> what compare.py wrote in the folder of that name."""
    figure, panels = plt.subplots(1, 3, figsize=(13, 3.4), sharey=True, width_ratios=(4, 2.2, 4))
    for axis, (title, bars) in zip(panels, GROUPS.items()):
        bars = [bar for bar in bars if bar[1] in tables]
        for x, (_, name, row, colour) in enumerate(bars):
            scores = tables[name][row]
            mean = statistics.mean(scores)
            axis.bar(x, mean, 0.75, color=colour, edgecolor="k", linewidth=0.5)
            axis.text(x, 0.02, f"{mean:.2f}", ha="center", fontsize=8)
            if len(set(scores)) > 1:
                axis.errorbar(x, mean, statistics.stdev(scores), color="k", capsize=4)
                axis.plot([x] * len(scores), scores, "k.", ms=4)
        axis.set_xticks(range(len(bars)), [bar[0] for bar in bars], fontsize=8)
        axis.set_title(title, fontsize=10)
    panels[0].set(ylim=(0, 0.9), ylabel="accuracy: mean, deviation, seeds (dots)")
    return figure


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("runs", type=Path, help="folder that demo.sh filled")
    parser.add_argument("-o", "--output", default="worth.png")
    args = parser.parse_args()
    found = {}
    for name in ("demo", "shipped", "scratch4", "words35"):
        for path in (args.runs / f"{name}.json", args.runs / name / "table.json"):
            if path.exists():
                found[name] = json.loads(path.read_text())["accuracy"]
    draw(found).savefig(args.output, dpi=110)


if __name__ == "__main__":
    main()
