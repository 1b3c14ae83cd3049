import pytest

from prolu.runtime.files import first_line, read_json_lines, read_json_object, write_json_lines


def test_json_lines_are_read_as_they_were_written(tmp_path):
    rows = [{"a": 1, "b": None}, {"a": 0.1, "words": "naïve\nline"}]
    write_json_lines(tmp_path / "rows.jsonl", rows)
    assert (tmp_path / "rows.jsonl").read_bytes().count(b"\n") == 2
    assert read_json_lines(tmp_path / "rows.jsonl") == rows
    assert read_json_lines(tmp_path / "no.jsonl") == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no study here \\(no study.json\\)"),
        (b"", "study.json: not JSON"),
        (b"{", "study.json: not JSON"),
        (b"\xff", "study.json: not JSON"),
        (b"[" * 100_000, "study.json: not JSON"),
        (b"[1]", "study.json: not a JSON object"),
        (b"null", "study.json: not a JSON object"),
    ],
)
def test_a_json_object_or_one_sentence(tmp_path, content, words):
    file = tmp_path / "study.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=words) as refused:
        read_json_object(file, "study")
    assert "\n" not in str(refused.value)
    file.write_text('{"a": [1]}')
    assert read_json_object(file, "study") == {"a": [1]}


def test_a_folder_in_place_of_a_json_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        read_json_object(tmp_path, "study")


@pytest.mark.parametrize(
    ("problem", "line"),
    [(ValueError("one\ntwo"), "one"), (KeyError(), "KeyError"), (OSError("\n  three "), "three")],
)
def test_first_line(problem, line):
    assert first_line(problem) == line
