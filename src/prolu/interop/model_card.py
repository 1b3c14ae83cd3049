"""The model card of a study on the Hugging Face hub: its figure, a table of its SAEs, and how to load them."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from prolu.activations.token_mask import NO_MASK, TokenMask
from prolu.evaluation.comparison.frontiers import Record, family, pareto_best
from prolu.evaluation.comparison.metric_catalog import main_metric

TAGS = ("sparse-autoencoder", "interpretability", "mechanistic-interpretability")

WITH_PREDICTIONS = ("CE increase", "recovered")
"""The columns that need a language model."""

LEGEND = {
    "L0": "the mean number of active latents per token.",
    "CE increase": "by how much the cross-entropy of the language model rises, in nats per token, if the SAE's "
    "reconstructions replace its activations.",
    "Recovered": "1 minus the CE increase as a fraction of the one that zeros in place of the activations cause.",
    "FVU": "the fraction of variance unexplained.",
    "Dead": "the fraction of latents that are never active.",
}
"""What the columns of the table are."""


def card_of(
    studies: Sequence[Mapping[str, Any]],
    shapes: Collection[tuple[int, int]],
    records: Sequence[Record],
    place: str,
    figure: str,
    license: str,
) -> str:
    """Return the model card of a study, or of the studies of a sweep at several hooks.

    Args:
        studies: The studies' configs, one per hook, without paths of this machine.
        shapes: The (d_in, d_sae) of the SAEs.
        records: The studies' finished runs. The `run_id` of each is the name of its folder in the repository.
        place: The repository, user/repo.
        figure: The file in the repository that shows the frontier.
        license: The licence, as the hub names it.
    """
    streams = [study["stream"] for study in studies]
    version = studies[0].get("versions", {}).get("prolu", "")
    unit = "tokens" if _has_lm(streams) else "rows"
    metric = "CE increase" if _has_lm(streams) else "FVU"
    return f"""---
{_front_matter(records, streams[0].get("lm", ""), license)}
---

# {place.partition("/")[2]}: {_count(len(records), "sparse autoencoder")} of {_name(streams[0])}

{_sentence(streams, shapes)} Trained and scored with `prolu` {version}.

![{metric} against L0, one line per family]({figure})

{_table(records, streams)}

{_legend(streams, metric)} All are measured on {_eval_tokens(records)} held-out {unit}. Converged: held-out L0 and MSE
moved less than 5% over the last fifth of training at full learning rate; SAEs that have not converged are not on the
frontier.

## Loading

```python
{_loading(_example(records), streams, place)}
```

`prolu pull {place} --out DIR` downloads everything as the folder of a study, and `prolu report DIR` makes a page of it.
Every folder here that has `sae.safetensors` is one SAE, and its `config.json` says what the SAE computes and where it
comes from. Both files can be read without this library. To use an SAE in another library, run
`prolu pull {place}/{_example(records)["run_id"]} --out sae` and then `prolu export`.
"""


def _has_lm(streams: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the activations come from a language model."""
    return "lm" in streams[0]


def _legend(streams: Sequence[Mapping[str, Any]], metric: str) -> str:
    """Return what the star and the columns of the table mean."""
    legend = dict(LEGEND)
    if not _has_lm(streams):
        legend = {name: text for name, text in legend.items() if name not in ("CE increase", "Recovered")}
        legend["L0"] = "the mean number of active latents per row."
    star = rf"\* On the frontier: no other converged SAE of this table beats it in both L0 and {metric}."
    return " ".join([star, *(f"{name}: {text}" for name, text in legend.items())])


def _loading(example: Record, streams: Sequence[Mapping[str, Any]], place: str) -> str:
    """Return the lines of Python that load one of the SAEs and use it."""
    lines = ["import prolu", "", f'sae = prolu.SAE.from_hub("{place}/{example["run_id"]}")']
    width = example["d_sae"]
    if _has_lm(streams):
        lm = json.dumps(streams[0]["lm"])
        lines.append(f"lm = prolu.LanguageModel({lm}, hook={json.dumps(_hook_of(example, streams))})")
        lines.append(f'latents = sae.encode(lm.activations("The cat sat on the mat"))  # [n_tokens, {width}]')
    else:
        lines.append(f"latents = sae.encode(rows)  # from fp32 [n_rows, d_in] to [n_rows, {width}]")
    return "\n".join(lines)


def _front_matter(records: Sequence[Record], lm: str, license: str) -> str:
    """Return the card's metadata as YAML."""
    from huggingface_hub import ModelCardData

    # `topk(32)` and `topk(64)` are one tag, in order of appearance.
    nonlinearities = dict.fromkeys(str(r["nonlinearity"]).partition("(")[0] for r in records)
    # The hub refuses a base model that is not one of its names in full, user/name.
    base_model = lm if lm.count("/") == 1 else None
    data = ModelCardData(library_name="prolu", license=license, tags=[*TAGS, *nonlinearities], base_model=base_model)
    return data.to_yaml()


def _sentence(streams: Sequence[Mapping[str, Any]], shapes: Collection[tuple[int, int]]) -> str:
    """Return the sentence that says what the SAEs are and what they were trained on."""
    first = streams[0]
    sizes = ", ".join(f"{d_in:,} -> {d_sae:,}" for d_in, d_sae in sorted(shapes))
    if not _has_lm(streams):
        return (
            f"Sparse autoencoders ({sizes}) of activations that come from no language model: {first['rows']:,} rows of "
            f"{_name(first)} to train on, and {first['held_out_rows']:,} that are held out."
        )
    mask = TokenMask.recorded(first)
    hooks = " and ".join(f"`{hook}`" for hook in dict.fromkeys(s["hook"] for s in streams))
    text = "the Python standard library's source" if first["data"] == "builtin" else f"`{first['data']}`"
    return (
        f"Sparse autoencoders ({sizes}) of the activations of {_model(first['lm'])} at {hooks}, trained on "
        f"{text} in blocks of {first['ctx']} tokens."
        + (f" Left out of training and scores: {mask}." if mask != NO_MASK else "")
    )


def _model(lm: str) -> str:
    return "prolu's built-in model" if lm == "builtin" else f"`{lm}`"


def _name(stream: Mapping[str, Any]) -> str:
    """Return what the activations come from: a language model, or rows."""
    return _model(stream["lm"]) if "lm" in stream else f"`{stream['data']}`"


def _table(records: Sequence[Record], streams: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table with a row per SAE, ordered by family and L0."""
    best = {r["run_id"] for r in pareto_best((r for r in records if r["converged"]), y=main_metric(records))}
    families = list(dict.fromkeys(family(r) for r in records))
    ordered = sorted(records, key=lambda r: (families.index(family(r)), r["l0"]))
    cells = [_row(r, r["run_id"] in best) for r in ordered]
    titles = [name for name in cells[0] if _has_lm(streams) or name not in WITH_PREDICTIONS]
    alignments = ["---", "---", *["--:"] * (len(titles) - 2)]  # numbers to the right
    rows = [titles, alignments, *([row[name] for name in titles] for row in cells)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _row(record: Record, is_best: bool) -> dict[str, str]:
    """Return the cells of an SAE by the titles of their columns."""
    star = r"\*" if is_best else ""
    ce_increase = record["degradation"]
    fvu = _number(record, "fvu", ".4f")
    return {
        "SAE": f"`{record['run_id']}`",
        "family": family(record),
        "L0": f"{record['l0']:.1f}",
        "CE increase": "-" if ce_increase is None else f"{ce_increase:.4f}{star}",
        "recovered": "-" if record["recovered"] is None else f"{record['recovered']:.1%}",
        "FVU": fvu + star if ce_increase is None else fvu,
        "dead": _number(record, "dead_fraction", ".1%"),
        "converged": "yes" if record["converged"] else "no",
    }


def _number(record: Record, name: str, form: str) -> str:
    """Return a number as text; runs of older versions lack some."""
    return format(record[name], form) if name in record else "-"


def _example(records: Sequence[Record]) -> Record:
    """Return the run whose loading the card shows: that with the median L0, of the converged ones if there are any."""
    shown = [r for r in records if r["converged"]] or list(records)
    return sorted(shown, key=lambda r: r["l0"])[len(shown) // 2]


def _hook_of(record: Record, streams: Sequence[Mapping[str, Any]]) -> str:
    """Return the hook of a run: studies of a sweep at several hooks are named after their hooks."""
    return next((s["hook"] for s in streams if s["hook"] == record.get("study")), streams[0]["hook"])


def _eval_tokens(records: Sequence[Record]) -> str:
    """Return the number of held-out tokens as text; it may differ between studies at several hooks."""
    return " or ".join(f"{n:,}" for n in sorted({r["eval_tokens"] for r in records if "eval_tokens" in r})) or "unknown"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("s" if n != 1 else "")
