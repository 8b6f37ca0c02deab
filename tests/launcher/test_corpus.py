"""Text in all the forms that --input takes, and the bad ones, each with one line."""

import gzip
import json

import pytest

from baton.configs.errors import UserError
from baton.launcher.training.corpus import documents, standard_library

FAR = 10**9


def test_files_folders_lines_and_gz(tmp_path):
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "a.py").write_text("alpha")
    (tmp_path / "folder" / "deep" / "b.md.gz").write_bytes(gzip.compress(b"beta"))
    (tmp_path / "folder" / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "folder" / "broken.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "folder" / "lines.jsonl").write_text('{"text": "gamma"}\n\n{"text": "del\u2028ta"}\n')
    (tmp_path / "named.weird").write_text("epsilon")
    found = list(documents([str(tmp_path / "folder"), str(tmp_path / "named.weird")], FAR))
    assert sorted(found) == ["alpha", "beta", "del\u2028ta", "epsilon", "gamma"]
    assert list(documents([str(tmp_path / "folder"), str(tmp_path / "named.weird")], FAR)) == found


@pytest.mark.slow
def test_the_default_is_the_standard_library_up_to_a_size():
    found = list(documents([], 300_000))
    assert 300_000 <= sum(len(text.encode()) for text in found) < 1_000_000
    typing = (standard_library() / "typing.py").read_text()
    assert typing in documents([], FAR)


def write(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b" \n", "the file is empty"),
        ("binary.txt", b"ok\xff\xfe", "no UTF-8 text at byte 2"),
        ("cut.txt.gz", gzip.compress(b"text" * 99)[:-9], "cannot be read"),
        ("damaged.txt.gz", gzip.compress(b"text" * 99)[:12] + b"!!!!!!!!", "cannot be read"),
        ("lines.jsonl", b'{"text": "\\ud800"}', ":1: allowed: a JSON object"),
        ("lines.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', ':2: allowed: a JSON object whose "text" is a string'),
        ("lines.jsonl", b"nonsense\n", ":1: allowed: a JSON object"),
        ("lines.jsonl", json.dumps({"text": 5}).encode(), ':1: allowed: a JSON object whose "text" is a string'),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=message) as caught:
        list(documents([str(path)], FAR))
    assert str(path) in str(caught.value)


def test_missing_and_barren_inputs(tmp_path):
    with pytest.raises(UserError, match="nowhere.txt: cannot be read: No such file"):
        list(documents([str(tmp_path / "nowhere.txt")], FAR))
    with pytest.raises(UserError, match="no file that ends in"):
        list(documents([str(tmp_path)], FAR))
