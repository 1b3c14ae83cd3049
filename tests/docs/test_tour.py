"""The notebook in examples/: it is saved without outputs, and runs from the first cell to the last in a real kernel."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TOUR = Path(__file__).parents[2] / "examples" / "tour.ipynb"


@pytest.fixture
def tour():
    return nbformat.read(TOUR, as_version=4)


def code_of(tour):
    return [cell for cell in tour.cells if cell.cell_type == "code"]


def test_it_is_saved_without_outputs(tour):
    nbformat.validate(tour)
    for cell in code_of(tour):
        assert cell.outputs == []
        assert cell.execution_count is None
    assert TOUR.stat().st_size < 20_000


def shown(cell, kind):
    return [output.data[kind] for output in cell.outputs if kind in output.get("data", {})]


@pytest.mark.slow  # starts a kernel, and trains in it
def test_it_runs_and_shows_tables_figures_and_progress(tour, tmp_path):
    cells = code_of(tour)
    small = {
        "N_TOKENS = 1_000_000": "N_TOKENS = 50_000",
        "d_sae=512": "d_sae=64",
        'load_blocks("builtin", lm.tokenizer': 'load_blocks("builtin", lm.tokenizer, max_train_tokens=60_000',
    }
    for long, short in small.items():
        assert sum(long in cell.source for cell in cells) == 1
        for cell in cells:
            cell.source = cell.source.replace(long, short)
    NotebookClient(tour, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    by_source = {cell.source: cell for cell in cells}
    (results,) = shown(by_source["results"], "text/html")
    assert results.count("<tr>") == 13
    assert "not converged" in results
    # One figure, and not the same one again when the cell ends.
    assert len(shown(by_source["results.plot()"], "image/png")) == 1
    (verdicts,) = shown(by_source["results.verdicts()"], "text/html")
    assert verdicts.count(">prolu_relu + sqrt_l1<") == 2
    (training,) = [cell for cell in cells if "run_sweep" in cell.source]
    text = "".join(output.text for output in training.outputs if output.get("name") == "stdout")
    lines = text.rstrip("\n").split("\n")
    # One line for what the language model does before, and one for the training.
    assert re.search(r"\rscoring the language model 100%, [\d:]+ *$", lines[0])
    assert re.search(r"\rtraining 100%, [\d:]+, L0 \d.* MSE \d.* CE increase [\d.]+ to [\d.]+ nats *$", lines[1])
    assert len(lines) == 2
    assert len((tmp_path / "runs/tour/results.jsonl").read_text().splitlines()) == 12
    for cell in cells:
        assert not [output for output in cell.outputs if output.output_type == "error"]
