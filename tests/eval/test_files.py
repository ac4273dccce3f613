"""Reading ahead, files of answers, folders that belong to a run."""

import gzip
import json
import threading

import pytest

from omnimamba.eval.ask import Answer, append_answers, cut_unfinished_line, read_answers
from omnimamba.eval.files import claim_folder, json_lines, read_ahead, require_images


@pytest.mark.parametrize("num", [0, 1, 3, 4, 10])
def test_read_ahead_keeps_the_order(num):
    batches = list(read_ahead(range(num), lambda i: i * i, 3))
    assert [value for batch in batches for value in batch] == [i * i for i in range(num)]
    assert all(len(batch) == 3 for batch in batches[:-1])


def test_read_ahead_is_one_batch_ahead():
    loaded = []
    batches = read_ahead(range(9), lambda i: loaded.append(i) or threading.current_thread(), 3)
    first = next(batches)
    assert threading.current_thread() not in first
    batches.close()
    assert set(loaded) <= set(range(6))  # the third batch waits for the second to be taken


def test_read_ahead_raises_what_a_loader_raises():
    def load(i):
        if i == 4:
            raise ValueError("no image")
        return i

    batches = read_ahead(range(9), load, 3)
    assert next(batches) == [0, 1, 2]
    with pytest.raises(ValueError, match="no image"):
        next(batches)


def test_answers_file(tmp_path):
    path = tmp_path / "answers.jsonl"
    cut_unfinished_line(path)
    assert not path.exists()
    answers = {"a/1": Answer("Ja,\nein “Hund”"), "a/2": Answer("", past_last_position=True)}
    append_answers(path, answers)
    assert read_answers(path) == answers
    whole = path.read_bytes()
    for num_bytes in range(len(whole.splitlines(keepends=True)[0]) + 1, len(whole)):
        path.write_bytes(whole[:num_bytes])
        cut_unfinished_line(path)
        assert list(read_answers(path)) == ["a/1"]
    path.write_text('{"id": "a"}\n')
    with pytest.raises(ValueError, match="line 1: no answer"):
        read_answers(path)


def test_a_folder_belongs_to_a_run(tmp_path):
    run = {"model": "nano", "limit": None, "generation": {"top_k": 4, "seed": 0}}
    claim_folder(tmp_path / "new", run)
    claim_folder(tmp_path / "new", dict(reversed(run.items())))
    assert json.loads((tmp_path / "new/run.json").read_text()) == run
    with pytest.raises(ValueError, match=r"another run \(limit None instead of 3\); choose another --out, or delete it"):
        claim_folder(tmp_path / "new", run | {"limit": 3})


def test_json_lines_of_damaged_files(tmp_path):
    whole = gzip.compress(b'{"a": 1}\n' * 100)
    for content in (whole[:-10], whole[:20], b"no gzip", gzip.compress(b"\xff")):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        with pytest.raises(ValueError, match="a.jsonl.gz: not a whole file of UTF-8 text"):
            list(json_lines(tmp_path / "a.jsonl.gz"))


def test_json_lines(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress('{"a": "é"}\n\n{"b": 2}'.encode()))
    assert [(place[-6:], record) for place, record in json_lines(tmp_path / "a.jsonl.gz")] == [("line 1", {"a": "é"}), ("line 3", {"b": 2})]


def test_missing_images_are_counted_once(tmp_path):
    with pytest.raises(ValueError, match=r"POPE lacks 2 of 2 images, e\.g\. a\.jpg, b\.jpg \(from there\)"):
        require_images(tmp_path, "POPE", [tmp_path / "a.jpg", tmp_path / "b.jpg", tmp_path / "a.jpg"], "there")
