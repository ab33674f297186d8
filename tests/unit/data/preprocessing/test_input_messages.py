"""Inputs in forms that are not read as they are: the message says what makes them readable."""

import json

import pytest

from megatron_dlm.data.preprocessing.document_readers import read_texts
from megatron_dlm.interfaces import InputError

RECORDS = [{"text": "one"}, {"text": "two"}]


def array(directory):
    (directory / "a.json").write_text(json.dumps(RECORDS))
    return directory / "a.json"


def indented_array(directory):
    (directory / "a.json").write_text(json.dumps(RECORDS, indent=1))
    return directory / "a.json"


def indented_object(directory):
    (directory / "a.jsonl").write_text(json.dumps(RECORDS[0], indent=4))
    return directory / "a.jsonl"


def saved_to_disk(directory):
    for name in ("state.json", "dataset_info.json", "data-00000-of-00001.arrow"):
        (directory / name).write_text("{}")
    return directory


def dictionary_saved_to_disk(directory):
    (directory / "dataset_dict.json").write_text('{"splits": ["train"]}')
    return directory


def tokens(directory):
    (directory / "a.bin").touch()
    (directory / "a.idx").touch()
    return directory / "a.bin"


def prefix_of_tokens(directory):
    return tokens(directory).with_suffix("")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (array, r"a\.json:1: a JSON array, not an object; `jq -c '\.\[\]'` writes its elements"),
        (indented_array, r"a\.json:1: JSON over several lines; `jq -c \.` .* `jq -c '\.\[\]'` an array's"),
        (indented_object, r"a\.jsonl:1: JSON over several lines; `jq -c \.`"),
        (saved_to_disk, r"save_to_disk; datasets\.load_from_disk\(.*\)\.to_parquet"),
        (dictionary_saved_to_disk, r"save_to_disk; datasets\.load_from_disk"),
        (tokens, r"a\.bin: tokens already; `megatron-dlm index --adopt \S+/a "),
        (prefix_of_tokens, r"a: tokens already; `megatron-dlm index --adopt \S+/a "),
    ],
)
def test_the_message_has_the_cure(tmp_path, make, message):
    with pytest.raises(InputError, match=message):
        list(read_texts([make(tmp_path)], "text"))


def test_lists_of_strings_are_read_from_parquet_as_from_json_lines(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": [["a", "b"], ["c"]]}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"text": ["a", "b"]}\n{"text": ["c"]}\n')
    assert list(read_texts([tmp_path / "a.parquet"], "text")) == ["ab", "c"]
    assert list(read_texts([tmp_path / "a.jsonl"], "text")) == ["ab", "c"]
    parquet.write_table(arrow.table({"text": [["a", None]]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match="holds list, not a string"):
        list(read_texts([tmp_path / "b.parquet"], "text"))
