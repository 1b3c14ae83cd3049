"""A study as people look at it: the page, its figures and tables, and pages of latents.

- `writer`: writes all of it into a study's folder.
- `page`, `html_tables`, `assets`: the HTML page.
- `terminal`: the summary in the terminal.
- `table_files`: results as CSV, LaTeX and Parquet.
- `latents`: pages of latents.
"""

from prolu.report.latents.pages import LatentPages
from prolu.report.terminal import print_estimate, print_summary
from prolu.report.writer import DrawnReport, verdicts_of, write_report

__all__ = ["DrawnReport", "LatentPages", "print_estimate", "print_summary", "verdicts_of", "write_report"]
