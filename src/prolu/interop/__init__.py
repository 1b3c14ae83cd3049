"""SAEs and studies elsewhere: other libraries' formats, SAEBench, the Hugging Face hub.

- `exchange`: the table of formats, `export_files` and `import_sae`; `format_names`: the names of the formats.
- `formats`: one file per format, the forms that they share, and how files are read and round trips checked.
- `saelens_registry`: SAEs by their names in SAELens's registry, which SAELens loads.
- `saebench`: an SAE of ours as SAEBench's evaluations take it; `sae_probes`: the figures of that benchmark.
- `sharing`, `model_card`: studies pushed to and pulled from the hub.

What a format cannot describe is refused and never approximated: an imported SAE computes what the original computes, or
the import is refused.
"""

from typing import TYPE_CHECKING

from prolu.runtime.late_import import names_of

if TYPE_CHECKING:
    from prolu.interop.exchange import *  # noqa: F403
    from prolu.interop.exchange import __all__ as __all__

__getattr__ = names_of("prolu.interop.exchange")
