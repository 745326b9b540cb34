"""The picture of the demo's table: python extras/runs/worth.py runs/demo_table -o worth.png

A bar for each way to use 400 labelled clips, with the deviation over seeds; the log-mel input as a line.
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


def draw(tables: dict[str, dict[str, list[float]]]):
    """`tables`: what compare.py found in the folders demo, shipped and scratch4."""
    demo = tables["demo"]
    shipped = tables["shipped"]
    bars = [
        ("from scratch", SCRATCH, demo, "0.7"),
        ("from scratch,\n4 times the updates", SCRATCH, tables["scratch4"], "0.7"),
        ("4 minutes of\npre-training", TUNED, demo, "C0"),
        ("the encoder that\ncomes with the code", TUNED, shipped, "C0"),
        ("untrained", PROBE + "random encoder", demo, "0.7"),
        ("4 minutes", PROBE + "pre-trained", demo, "C1"),
        ("the encoder that\ncomes with the code", PROBE + "pre-trained", shipped, "C1"),
    ]
    figure, axis = plt.subplots(figsize=(9, 3.4))
    for x, (_, row, table, colour) in zip((0, 1, 2, 3, 4.5, 5.5, 6.5), bars):
        scores = table[row]
        style = dict(color=colour)
        if len(set(scores)) > 1:
            style |= dict(yerr=statistics.stdev(scores), capsize=4)
        axis.bar(x, statistics.mean(scores), 0.75, **style)
        axis.plot([x] * len(scores), scores, "k.", ms=4)
    axis.axhline(statistics.mean(demo[PROBE + "log-mel"]), color="k", ls="--", lw=1)
    axis.text(7.05, demo[PROBE + "log-mel"][0] + 0.01, "linear model\nof the log-mel", fontsize=8)
    axis.set_xticks((0, 1, 2, 3, 4.5, 5.5, 6.5), [bar[0] for bar in bars], fontsize=7)
    axis.set(xlim=(-0.6, 8.2), ylim=(0, 0.9), ylabel="accuracy, ten words")
    for x, title in ((1.5, "fine-tuned"), (5.5, "frozen, linear probe by bands")):
        axis.text(x, 0.85, title, ha="center")
    return figure


if __name__ == "__main__":
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("runs", type=Path, help="folder that demo.sh filled")
    parser.add_argument("-o", "--output", default="worth.png")
    args = parser.parse_args()
    found = {}
    for name in ("demo", "shipped", "scratch4"):
        paths = (args.runs / f"{name}.json", args.runs / name / "table.json")
        found[name] = json.loads(next(filter(Path.exists, paths)).read_text())["accuracy"]
    draw(found).savefig(args.output, dpi=110)
