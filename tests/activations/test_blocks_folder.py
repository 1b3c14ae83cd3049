"""Tests of two processes that write token blocks into one folder at once."""

import numpy as np
import pytest

from prolu.activations.blocks_folder import BlocksFolder
from prolu.runtime.files import FolderBusyError

ROWS = np.arange(8).reshape(2, 4)
MADE = {"ctx": 4}


def folder_of_blocks(folder):
    return BlocksFolder(folder, MADE, np.dtype(np.uint16))


def test_a_second_writer_is_kept_out_while_the_first_writes(tmp_path):
    first = folder_of_blocks(tmp_path / "tokens")
    second = folder_of_blocks(tmp_path / "tokens")
    with first, second:  # neither has found a folder to lock
        first.append(ROWS, False)
        with pytest.raises(FolderBusyError, match="another process is working there"):
            second.append(ROWS, False)
        first.append(ROWS, True)
        first.finish()
    assert folder_of_blocks(tmp_path / "tokens").finished


def test_a_second_writer_does_not_write_over_what_the_first_has_finished(tmp_path):
    second = folder_of_blocks(tmp_path / "tokens")
    with second:
        with folder_of_blocks(tmp_path / "tokens") as first:
            first.append(ROWS, False)
            first.append(ROWS, True)
            first.finish()
        sealed = (tmp_path / "tokens" / "blocks.json").read_text()
        with pytest.raises(FolderBusyError, match="try again"):
            second.append(ROWS, False)
    assert (tmp_path / "tokens" / "blocks.json").read_text() == sealed
    with folder_of_blocks(tmp_path / "tokens") as again:
        assert again.finished
