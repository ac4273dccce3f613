"""`omnimamba batch`: many images and prompts, the same results as one by one, and going on after an interruption."""

import json

import pytest
from PIL import Image

from omnimamba import bulk


def write(file, *rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def pictures(tmp_path):
    for i, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{i}.png")
    return tmp_path


def test_describe(cli, folder, omni, pictures):
    rows = [{"image": "0.png", "id": 7}, {"image": "1.png", "question": "why?"}, {"image": "2.png"}]
    jobs, out = write(pictures / "jobs.jsonl", *rows), pictures / "new" / "out.jsonl"
    options = ("--question", "what?", "--max-new-tokens", "6", "--batch", "2", "--shard-size", "2", "--model", folder)
    result = cli("batch", "describe", jobs, "-o", out, *options)
    assert (result.code, result.out, result.err) == (0, f"{out}\n3 lines\n", "")
    answers = [omni.describe(pictures / row["image"], row.get("question", "what?"), max_new_tokens=6) for row in rows]
    assert lines(out) == [{**row, "answer": answer} for row, answer in zip(rows, answers, strict=True)]


def test_images_that_cannot_be_read(cli, folder, pictures):
    (pictures / "broken.png").write_text("no image")
    jobs, out = write(pictures / "jobs.jsonl", {"image": "broken.png"}, {"image": "0.png"}, {"image": "none.png"}), pictures / "out.jsonl"
    options = ("batch", "describe", jobs, "-o", out, "--max-new-tokens", "4", "--model", folder)
    result = cli(*options, "--max-broken", "1")
    assert result.code == 2 and "2 images cannot be read, more than the limit of 1, e.g. broken.png: " in result.err and not out.exists()
    result = cli(*options, "--max-broken", "2")
    assert result.out == f"{out}\n3 lines, 2 of them with an error instead of an answer\n"
    assert ["answer" in row for row in lines(out)] == ["error" not in row for row in lines(out)] == [False, True, False]


def test_the_result_of_an_earlier_run_as_jobs(cli, folder, omni, pictures):
    """Whoever repairs an image asks again with the file of answers; each answer goes to its own line."""
    rows = [{"image": "0.png", "error": "cut off"}, {"image": "1.png", "answer": "old"}, {"image": "none.png", "answer": "old"}]
    jobs, out = write(pictures / "jobs.jsonl", *rows), pictures / "out.jsonl"
    options = ("--max-broken", "1", "--max-new-tokens", "6", "--model", folder)
    assert cli("batch", "describe", jobs, "-o", out, *options).out == f"{out}\n3 lines, 1 of them with an error instead of an answer\n"
    *good, broken = lines(out)
    assert good == [{"image": name, "answer": omni.describe(pictures / name, max_new_tokens=6)} for name in ("0.png", "1.png")]
    assert broken.keys() == {"image", "error"}


def test_generate(cli, folder, omni, tmp_path):
    rows = [{"prompt": "a cat"}, {"prompt": "a dog", "seed": 5, "id": "x"}, {"prompt": "a zoo"}]
    jobs, out = write(tmp_path / "jobs.jsonl", *rows), tmp_path / "out.jsonl"
    result = cli(
        "batch", "generate", jobs, "-o", out, "-n", "2", "--seed", "3", "--temperature", "0.7", "--shard-size", "2", "--model", folder
    )
    assert (result.code, result.out, result.err) == (0, f"{out}\n3 lines\n", "")
    found = lines(out)
    assert [row["seed"] for row in found] == [3, 5, 5] and found[1]["id"] == "x"
    for row in found:
        images = omni.generate_image(row["prompt"], num_images=2, temperature=0.7, seed=row["seed"])
        for file, image in zip(row["files"], images, strict=True):
            with Image.open(file) as saved:
                assert saved.tobytes() == image.tobytes()


def test_going_on(cli, folder, tmp_path, monkeypatch):
    jobs, out = write(tmp_path / "jobs.jsonl", *({"prompt": f"cat {i}"} for i in range(5))), tmp_path / "out.jsonl"
    options = ("batch", "generate", jobs, "-o", out, "--shard-size", "2", "--model", folder)
    write_lines, written = bulk.write_lines, []

    def stops(file, rows):
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(len(rows))
        write_lines(file, rows)

    monkeypatch.setattr(bulk, "write_lines", stops)
    assert cli(*options).code == 130 and not out.exists()
    monkeypatch.setattr(bulk, "write_lines", lambda file, rows: written.append(len(rows)) or write_lines(file, rows))
    assert cli(*options).code == 0 and written == [2, 2, 1]
    assert [row["prompt"] for row in lines(out)] == [f"cat {i}" for i in range(5)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "jobs.jsonl: no line in it"),
        ('{"prompt": "a"}\nprompt', "jobs.jsonl line 2: not JSON"),
        ('{"prompt": ""}', 'jobs.jsonl line 1: expected an object with a text "prompt"'),
        ('{"promt": "a"}', 'jobs.jsonl line 1: expected an object with a text "prompt"'),
        ('{"prompt": "a"}\n{"prompt": "b", "seed": "7"}', "jobs.jsonl line 2: seed='7' is no seed"),
        ('{"prompt": "a", "seed": null}', "jobs.jsonl line 1: seed=None is no seed"),
    ],
)
def test_lines_that_do_not_fit(cli, folder, tmp_path, text, message):
    (tmp_path / "jobs.jsonl").write_text(text)
    result = cli("batch", "generate", tmp_path / "jobs.jsonl", "-o", tmp_path / "out.jsonl", "--model", folder)
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1


@pytest.mark.parametrize("question", ["", 5, None])
def test_questions_that_are_none(cli, folder, tmp_path, question):
    jobs = write(tmp_path / "jobs.jsonl", {"image": "0.png", "question": question})
    result = cli("batch", "describe", jobs, "-o", tmp_path / "out.jsonl", "--model", folder)
    assert result.code == 2 and f"jobs.jsonl line 1: question={question!r} is no question" in result.err
