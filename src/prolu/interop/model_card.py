"""The model card of a study on the Hugging Face hub: its figure, a table of its SAEs, and how to load them."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from prolu.evaluation.comparison.frontiers import Record, family, pareto_best

TAGS = ("sparse-autoencoder", "interpretability", "mechanistic-interpretability")

COLUMNS = ("SAE", "family", "L0", "CE increase", "recovered", "FVU", "dead", "converged")


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
    lm = streams[0]["lm"]
    example = _example(records)
    return f"""---
{_front_matter(records, lm, license)}
---

# {place.partition("/")[2]}: {_count(len(records), "sparse autoencoder")} of {_model(lm)}

{_sentence(streams, shapes)} Trained and scored with `prolu` {version}.

![CE increase against L0, one line per family]({figure})

{_table(records)}

\\* On the frontier: no other converged SAE of this table beats it in both L0 and CE increase. L0: the mean number of
active latents per token. CE increase: by how much the cross-entropy of the language model rises, in nats per token, if
the SAE's reconstructions replace its activations. Recovered: 1 minus the CE increase as a fraction of the one that
zeros in place of the activations cause. FVU: the fraction of variance unexplained. Dead: the fraction of latents that
are never active. All are measured on {_eval_tokens(records)} held-out tokens. Converged: held-out L0 and MSE moved less
than 5% over the last fifth of training at full learning rate; SAEs that have not converged are not on the frontier.

## Loading

```python
import prolu

sae = prolu.SAE.from_hub("{place}/{example["run_id"]}")
lm = prolu.LanguageModel({json.dumps(lm)}, hook={json.dumps(_hook_of(example, streams))})
latents = sae.encode(lm.activations("The cat sat on the mat"))  # [n_tokens, {example["d_sae"]}]
```

`prolu pull {place} --out DIR` downloads everything as the folder of a study, and `prolu report DIR` makes a page of it.
Every folder here that has `sae.safetensors` is one SAE, and its `config.json` says what the SAE computes and where it
comes from. Both files can be read without this library. To use an SAE in another library, run
`prolu pull {place}/{example["run_id"]} --out sae` and then `prolu export`.
"""


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
    """Return a Markdown table with a row per SAE, ordered by family and L0."""
    best = {r["run_id"] for r in pareto_best(r for r in records if r["converged"])}
    families = list(dict.fromkeys(family(r) for r in records))
    alignments = ("---", "---", *("--:",) * (len(COLUMNS) - 2))  # numbers to the right
    rows = [COLUMNS, alignments]
    rows += [_row(r, r["run_id"] in best) for r in sorted(records, key=lambda r: (families.index(family(r)), r["l0"]))]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _row(record: Record, is_best: bool) -> tuple[str, ...]:
    star = r"\*" if is_best else ""
    return (
        f"`{record['run_id']}`",
        family(record),
        f"{record['l0']:.1f}",
        f"{record['degradation']:.4f}{star}",
        "-" if record["recovered"] is None else f"{record['recovered']:.1%}",
        _number(record, "fvu", ".4f"),
        _number(record, "dead_fraction", ".1%"),
        "yes" if record["converged"] else "no",
    )


def _number(record: Record, name: str, form: str) -> str:
    """Return a number as text; runs of older versions lack some."""
    return format(record[name], form) if name in record else "-"


def _example(records: Sequence[Record]) -> Record:
    """Return the run that the card loads as its example: of those that have converged, if any, the one of median L0."""
    shown = [r for r in records if r["converged"]] or list(records)
    return sorted(shown, key=lambda r: r["l0"])[len(shown) // 2]


def _hook_of(record: Record, streams: Sequence[Mapping[str, Any]]) -> str:
    """Return the hook of a run: studies of a sweep at several hooks are named after their hooks."""
    return next((s["hook"] for s in streams if s["hook"] == record.get("study")), streams[0]["hook"])


def _eval_tokens(records: Sequence[Record]) -> str:
    """Return the number of held-out tokens as text; studies at several hooks may differ in it."""
    return " or ".join(f"{n:,}" for n in sorted({r["eval_tokens"] for r in records if "eval_tokens" in r})) or "unknown"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("s" if n != 1 else "")
