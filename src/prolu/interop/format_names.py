"""The names of the formats, in a file without PyTorch: the command line needs them for its help."""

from typing import Literal

ExportFormat = Literal["prolu", "saelens", "dictionary_learning", "circuit_tracer"]
"""The formats that can be written."""

ImportFormat = Literal["prolu", "saelens", "dictionary_learning", "sparsify", "gemma_scope", "gemma_scope_2"]
"""The formats that can be read."""
