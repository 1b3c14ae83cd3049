"""Draw the times of training steps in multiples of the floor, from the JSON files of `benchmarks/step.py`.

python benchmarks/figure.py benchmarks/step.json benchmarks/step-heap-reuse.json docs/figures/speed.png
"""

import json
import sys
from pathlib import Path

from prolu.evaluation.comparison.figures import Figure, save_figure

LABELS = {
    "sparse_numba": "prolu, sparse (numba)",
    "sparse_torch": "prolu, sparse (plain torch)",
    "dense": "prolu, dense",
    "autograd": "plain autograd",
    "dictionary_learning_standard": "dictionary_learning, standard",
    "dictionary_learning_jumprelu": "dictionary_learning, JumpReLU",
    "saelens_standard": "SAELens, standard",
    "saelens_jumprelu": "SAELens, JumpReLU",
}


def main() -> None:
    """Draw two bars for each variant: with the stock allocator and with heap reuse."""
    stock, reuse, out = (Path(name) for name in sys.argv[1:])
    results = [json.loads(file.read_text()) for file in (stock, reuse)]
    names = [name for name in LABELS if name in results[0]["variants"]]
    figure = Figure(figsize=(7.2, 0.6 + 0.5 * len(names)))
    axes = figure.subplots()
    for offset, result, ink, label in (
        (-0.19, results[0], "#0072B2", "stock allocator"),
        (0.19, results[1], "#9ecae1", "heap reuse"),
    ):
        values = [result["variants"][name]["x_floor"] for name in names]
        places = [i + offset for i in range(len(names))]
        bars = axes.barh(places, values, height=0.36, color=ink, label=f"{label} (floor {result['floor_s']:.2f} s)")
        axes.bar_label(bars, [f"{v:.2f}" if v < 2 else f"{v:.1f}" for v in values], padding=3, fontsize=8)
    axes.axvline(1, color="#444444", linewidth=1)
    axes.set_yticks(range(len(names)), [LABELS[name] for name in names])
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    shape = f"{results[0]['d_in']} -> {results[0]['d_sae']}, batch {results[0]['batch']}, L0 {results[0]['l0']:.0f}"
    axes.set(
        xlabel="time of a training step, multiples of the floor", title=f"{shape}, fp32, {results[0]['threads']} cores"
    )
    axes.legend(frameon=False, fontsize=9, loc="upper right")
    save_figure(figure, out)


if __name__ == "__main__":
    main()
