"""Caption and conversation files: every format that is read, and one clear line for each that cannot be."""

import gzip
import json
import re

import pytest

from omnimamba.data.text import Captions, Conversation, read_captions, read_conversations

TALK = {
    "image": "a.png",
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A zoo."}],
    "type": "name",
}
TEXT_ONLY = {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Good day"}]}
READ = [
    Conversation("a.png", (("human", "<image>\nWhat?"), ("gpt", "A zoo.")), "name"),
    Conversation(None, (("human", "Hello"), ("gpt", "Good day"))),
]


@pytest.fixture
def write(tmp_path):
    """Writes a file, packed if its name ends in .gz, and returns its path."""

    def write(name, content):
        content = content if isinstance(content, bytes) else content.encode()
        path = tmp_path / name
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return path

    return write


def lines(*records):
    return "\n".join(json.dumps(record, ensure_ascii=False) for record in records)


@pytest.mark.parametrize(
    ("written", "content", "read"),
    [
        ("a.json", json.dumps([TALK, TEXT_ONLY], indent=1), "a.json"),
        ("a.jsonl", lines(TALK, TEXT_ONLY) + "\n\n", "a.jsonl"),
        ("a.jsonl.gz", lines(TALK, TEXT_ONLY), "a.jsonl.gz"),
        ("a.jsonl.gz", lines(TALK, TEXT_ONLY), "a.jsonl"),
        ("a.json.gz", json.dumps([TALK, TEXT_ONLY]), "a.json"),
    ],
)
def test_conversations(write, written, content, read):
    assert read_conversations(write(written, content).with_name(read)) == READ


def test_the_plain_file_is_read_where_both_are(write):
    write("a.jsonl.gz", lines(TALK))
    assert read_conversations(write("a.jsonl", lines(TEXT_ONLY))) == READ[1:]


def test_unicode_line_ends_inside_a_string(write):
    value = "one\u2028two\x85three"
    assert read_captions(write("a.jsonl", lines({"image": "a", "captions": [value]}))) == [Captions("a", (value,))]


def test_windows_line_ends(write):
    assert read_conversations(write("a.jsonl", lines(TALK, TEXT_ONLY).replace("\n", "\r\n"))) == READ


CAPTIONS = [{"image": "a.png", "captions": ["one", "two"]}, {"image": "b.png", "captions": ["three"]}]
COCO = {
    "images": [{"id": 7, "file_name": "b.png"}, {"id": 5, "file_name": "a.png"}, {"id": 9, "file_name": "without.png"}],
    "annotations": [{"image_id": 5, "caption": "one"}, {"image_id": 7, "caption": "three"}, {"image_id": 5, "caption": "two"}],
}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines(*CAPTIONS)),
        ("a.json", json.dumps(CAPTIONS)),
        ("a.jsonl.gz", lines(*CAPTIONS)),
        ("a.json", json.dumps(COCO)),
        ("a.json.gz", json.dumps(COCO, indent=1)),
    ],
)
def test_captions(write, name, content):
    assert read_captions(write(name, content)) == [Captions("a.png", ("one", "two")), Captions("b.png", ("three",))]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"image": "a"', "line 1: not JSON"),
        (lines(CAPTIONS[0]) + "\n{", "line 2: not JSON"),
        ("[1, 2", "not JSON"),
        ('{"image": "a"}', "line 1: expected"),
        ('{"captions": ["a"]}', "line 1: expected"),
        ('{"image": 5, "captions": ["a"]}', "line 1: expected"),
        ('{"image": "a", "captions": "letters"}', "line 1: expected"),
        ('{"image": "a", "captions": []}', "line 1: expected .* with at least one caption"),
        ('{"image": "a", "captions": ["fine", " "]}', "line 1: expected .* none of them empty"),
        ("[3]", "record 0: expected"),
        ('["image"]', "record 0: expected"),
    ],
)
def test_malformed_captions(write, content, message):
    path = write("captions.jsonl", content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}:? ?{message}") as error:
        read_captions(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"images": [', "not JSON"),
        ("5", "not a COCO caption file"),
        ('{"images": []}', "not a COCO caption file .no 'annotations'"),
        ('{"images": [], "annotations": [{"image_id": 3, "caption": "one"}]}', "not a COCO caption file .no 3"),
        (
            '{"images": [{"id": 3, "file_name": "x"}], "annotations": [{"image_id": 3, "caption": ""}]}',
            "1 images have an empty caption, e.g. x",
        ),
    ],
)
def test_malformed_coco_captions(write, content, message):
    path = write("captions.json", content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: {message}"):
        read_captions(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nonsense", "line 1: not JSON"),
        ("[null]", "record 0: expected"),
        ('{"image": "a"}', "line 1: expected"),
        ('{"conversations": []}', "line 1: expected"),
        ('{"conversations": "talk"}', "line 1: expected"),
        ('{"conversations": [{"from": "human"}]}', "line 1: expected"),
        ('{"conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "x"}]}', "line 1: expected"),
        (lines(TALK | {"image": 3}), "line 1: expected"),
        (lines(TALK, TEXT_ONLY | {"conversations": TALK["conversations"][:1]}), "line 2: turns must alternate human, gpt"),
        (lines({"conversations": TALK["conversations"][::-1]}), "line 1: turns must alternate human, gpt"),
    ],
)
def test_malformed_conversations(write, content, message):
    path = write("talk.jsonl", content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}:? ?{message}") as error:
        read_conversations(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [b"no gzip", gzip.compress(lines(TALK).encode())[:-9], gzip.compress(b"\xff\xfe{}")],
    ids=["no gzip", "cut short", "no text"],  # gzip files hold the time, and all workers have to give a test the same name
)
def test_damaged_file(tmp_path, content):
    path = tmp_path / "talk.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: not a whole file of UTF-8 text"):
        read_conversations(path)


def test_missing_file(tmp_path):
    for read in (read_captions, read_conversations):
        with pytest.raises(ValueError, match="talk.json: no such file"):
            read(tmp_path / "talk.json")
