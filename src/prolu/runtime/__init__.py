"""The lowest layer of the package: everything that knows neither an SAE nor a language model.

- `files`: files that are complete or absent, folders that one process locks, JSON.
- `names`: plain names, and text that a terminal may be sent.
- `checks`: checks of what a user asks for.
- `rng`: random generators named by a key.
- `mesh`: the processes that train one SAE together, and their sums.
- `devices`: which of the GPUs a name means, and whether it is there.
- `interrupts`: the first signal to stop saves, the second one exits.
- `stopping`: the error that says that the disk failed.
- `progress`: rates and the time left.
- `tables`: a column of a table; `notebooks`: what a notebook shows of an object.
- `late_import`: packages whose names are imported when the first is used.
- `version`: the version of this package.
- `hub`: files downloaded from the Hugging Face hub and sent to it.
"""
