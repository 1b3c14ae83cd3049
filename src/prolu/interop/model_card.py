"""The model card of a study on the Hugging Face hub: figure, table, how to load; Markdown under YAML."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from prolu.evaluation.comparison.frontiers import Record, family, pareto_best

TAGS = ("sparse-autoencoder", "interpretability", "mechanistic-interpretability")

COLUMNS = ("SAE", "family", "L0", "degradation", "recovered", "FVU", "dead", "converged")


def card_of(
    studies: Sequence[Mapping[str, Any]],
    shapes: Collection[tuple[int, int]],
    records: Sequence[Record],
    place: str,
    figure: str,
    license: str,
) -> str:
    """The card.

    Args:
        studies: their configs, one a hook, as the hub may see them.
        shapes: d_in and d_sae of the SAEs.
        records: their runs; the `run_id` of each is the name of its folder in the repository.
        place: as the hub names the repository, user/repo.
        figure: file of the frontier beside it.
        license: as the hub names it.
    """
    streams, version = [study["stream"] for study in studies], studies[0].get("versions", {}).get("prolu", "")
    example, lm = _example(records), streams[0]["lm"]
    return f"""---
{_front_matter(records, streams, license)}
---

# {place.partition("/")[2]}: {_count(len(records), "sparse autoencoder")} of {_model(lm)}

{_sentence(streams, shapes)} Trained and scored with `prolu` {version}.

![Information lost against L0, families joined]({figure})

{_table(records)}

\\* Pareto-best in L0 and degradation among converged SAEs. L0: latents on per token. Degradation: what next-token
cross-entropy loses when reconstructions stand in place of the activations, nats per token; recovered: the same as a
share of what zeros in their place lose. FVU: fraction of variance unexplained. Dead: latents that are never on. All on
{_eval_tokens(records)} held-out tokens. Converged: held-out L0 and MSE moved less than 5% over the last fifth of
training at full learning rate; one that has not decides no comparison.

## Loading

```python
import prolu

sae = prolu.SAE.from_hub("{place}/{example["run_id"]}")
lm = prolu.LanguageModel({json.dumps(lm)}, hook="{_hook_of(example, streams)}")
latents = sae.encode(lm.activations("The cat sat on the mat"))  # [n_tokens, {example["d_sae"]}]
```

`prolu pull {place} --out DIR` fetches all of it as a study's folder, of which `prolu report DIR` makes a page. Every
folder here that has `sae.safetensors` is one SAE. Its `config.json` says what it computes and where it comes from; both
files are read without this library too. For other libraries, `prolu pull {place}/{example["run_id"]} --out sae` and
`prolu export`.
"""


def _front_matter(records: Sequence[Record], streams: Sequence[Mapping[str, Any]], license: str) -> str:
    """YAML, of which JSON is a part."""
    names = dict.fromkeys(str(r["nonlinearity"]).partition("(")[0] for r in records)
    facts: dict[str, Any] = {"library_name": "prolu", "license": license, "tags": [*TAGS, *names]}
    if streams[0]["lm"].count("/") == 1:  # a hub name in full
        facts["base_model"] = streams[0]["lm"]
    return "\n".join(f"{name}: {json.dumps(value)}" for name, value in facts.items())


def _sentence(streams: Sequence[Mapping[str, Any]], shapes: Collection[tuple[int, int]]) -> str:
    """What they are, and what they were trained on."""
    first = streams[0]
    hooks = " and ".join(f"`{hook}`" for hook in dict.fromkeys(s["hook"] for s in streams))
    sizes = ", ".join(f"{d_in:,} -> {d_sae:,}" for d_in, d_sae in sorted(shapes))
    text = "the Python standard library's source" if first["data"] == "builtin" else f"`{first['data']}`"
    return (
        f"Sparse autoencoders ({sizes}) of the activations of {_model(first['lm'])} at {hooks}, trained on "
        f"{text} in blocks of {first['ctx']} tokens."
    )


def _model(lm: str) -> str:
    return "prolu's built-in model" if lm == "builtin" else f"`{lm}`"


def _table(records: Sequence[Record]) -> str:
    """A row an SAE, by family and L0."""
    best = {r["run_id"] for r in pareto_best(r for r in records if r["converged"])}
    order = list(dict.fromkeys(family(r) for r in records))
    rows = [COLUMNS, ("---", "---", *("--:",) * (len(COLUMNS) - 2))]
    for r in sorted(records, key=lambda r: (order.index(family(r)), r["l0"])):
        star = r"\*" if r["run_id"] in best else ""
        rows.append((
            f"`{r['run_id']}`", family(r), f"{r['l0']:.1f}", f"{r['degradation']:.4f}{star}", f"{r['recovered']:.1%}",
            _number(r, "fvu", ".4f"), _number(r, "dead_fraction", ".1%"), "yes" if r["converged"] else "no",
        ))  # fmt: skip
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _number(record: Record, name: str, form: str) -> str:
    """Runs of older versions lack some."""
    return format(record[name], form) if name in record else "-"


def _example(records: Sequence[Record]) -> Record:
    """The one to show: of those that converged, if any has, the one of middle L0."""
    shown = [r for r in records if r["converged"]] or list(records)
    return sorted(shown, key=lambda r: r["l0"])[len(shown) // 2]


def _hook_of(record: Record, streams: Sequence[Mapping[str, Any]]) -> str:
    """Where studies lie side by side, each is named by its hook."""
    return next((s["hook"] for s in streams if s["hook"] == record.get("study")), streams[0]["hook"])


def _eval_tokens(records: Sequence[Record]) -> str:
    return " or ".join(f"{n:,}" for n in sorted({r["eval_tokens"] for r in records if "eval_tokens" in r})) or "unknown"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("s" if n != 1 else "")
