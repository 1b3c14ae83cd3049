"""The cellar of the package: whatever knows neither an SAE nor a language model.

- `files`: files that are complete or absent, folders with one owner, JSON.
- `checks`: checks of what a user asks for.
- `rng`: random generators named by a key.
- `mesh`: the ranks that train one SAE together, and their sums.
- `interrupts`: the first signal to stop saves, the second one exits.
- `progress`: rates and the time left.
- `hub`: files fetched from the Hugging Face hub and sent to it.
"""
