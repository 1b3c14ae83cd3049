"""A study as people look at it: the page, its figures and tables, and pages of latents.

- `writer`: writes the report of a study, or of several together, into a folder.
- `page`: the HTML page; `page_data`: what its scripts draw; `html_tables`, `run_tables`, `run_settings`: its tables;
  `assets`: its templates, styles and scripts.
- `server`, `watched_study`: the page of a study in training, served to this machine.
- `terminal`, `terminal_comparison`: the summary that the commands print; `estimate`: what a study will cost;
  `console`: tables and sentences that fit a terminal.
- `agreement`: whether seeds agree, as tables of the page, of the terminal and as CSV.
- `truth_section`: how families stand to features that are known.
- `headline`: the few numbers of one SAE.
- `table_files`: all results as CSV and Parquet.
- `latents`: pages of latents.
"""

from prolu.report.estimate import print_estimate
from prolu.report.latents.pages import LatentPages
from prolu.report.terminal import print_summary
from prolu.report.writer import DrawnReport, write_report

__all__ = ["DrawnReport", "LatentPages", "print_estimate", "print_summary", "write_report"]
