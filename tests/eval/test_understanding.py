"""Every benchmark from a folder in its published format to the report: prompts, resuming, shards, missing files."""

import json

import pytest

from omnimamba.cli import main
from omnimamba.engine.omnimamba import OmniMamba
from omnimamba.eval import understanding
from omnimamba.eval.ask import Shard
from omnimamba.eval.understanding import BENCHMARKS, evaluate, merge

SHORT = "\nAnswer the question using a single word or phrase."
FIRST_PROMPTS = {
    "pope": "Is there a person in the image?" + SHORT,
    "mme": "Is this red?" + SHORT,
    "gqa": "Is it overcast?" + SHORT,
    "vqav2": "Is it red?" + SHORT,
    "textvqa": "what does it say?\nReference OCR token: STOP" + SHORT,
    "mmmu": ("What is in <image 1>?\n(A) a red square\n(B) <image 2>\n\nAnswer with the option's letter from the given choices directly."),
}
NUM_QUESTIONS = {"pope": 12, "mme": 28, "gqa": 3, "vqav2": 2, "textvqa": 2, "mmmu": 31}


@pytest.fixture(scope="module")
def nano():
    return OmniMamba.from_pretrained("nano", device="cpu")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_prompts(published, name):
    questions = BENCHMARKS[name].questions(published[name])
    assert questions[0].text == FIRST_PROMPTS[name]
    assert len(questions) == len({question.id for question in questions}) == NUM_QUESTIONS[name]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_from_folder_to_report_with_the_shipped_model(nano, published, tmp_path, name):
    steps = []
    limit = 6 if name in ("mme", "mmmu") else None
    report = evaluate(nano, name, published[name], tmp_path, limit=limit, max_new_tokens=2, progress=lambda *step: steps.append(step))
    num = limit or NUM_QUESTIONS[name]
    assert steps[0] == ("questions", 0, num) and steps[-1] == ("questions", num, num)
    values = json.loads((tmp_path / "report.json").read_text())
    assert values == json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert len(values["answers"]) == num and values["answers"][0]["prompt"] == FIRST_PROMPTS[name]
    assert values["protocol"]["fingerprint"] == nano.bundle.fingerprint and values["protocol"]["protocol"]
    assert bool(report.figures) == (name != "vqav2")  # test-dev has no references, but a file to upload
    assert (tmp_path / "upload.json").is_file() == (name == "vqav2")
    header, *rows = report.table()
    assert header[0] == "figure" and all(len(row) == len(header) for row in rows)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_perfect_answers(published, tmp_path, name, omni, monkeypatch):
    """A model that knows the references gets full marks."""
    split = "val" if name == "vqav2" else None
    questions = BENCHMARKS[name].questions(published[name], split)
    told = {(question.image_name, question.text): perfect(name, question) for question in questions}
    names = list(dict.fromkeys(question.image_name for question in questions))

    def answer(self, features, texts, **_):
        some = [names.pop(0) for _ in texts]
        return [[told[image, text] for text in row] for image, row in zip(some, texts, strict=True)]

    monkeypatch.setattr(OmniMamba, "answer", answer)
    figures = {key: figure.value for key, figure in evaluate(omni, name, published[name], tmp_path, split=split).figures.items()}
    rest = {"guessed": 0} | {f"{sampling}_unclear": 0 for sampling in ("random", "popular", "adversarial")}
    rest |= {f"{sampling}_yes_ratio": 0.5 for sampling in ("random", "popular", "adversarial")}
    if name == "mme":
        kinds = (*understanding.mme.PERCEPTION, *understanding.mme.COGNITION)
        rest = dict.fromkeys(kinds, 200) | {"perception": 2000, "cognition": 800}
    assert figures == pytest.approx({key: rest.get(key, 1) for key in figures})


def perfect(name, question):
    match name:
        case "pope":
            return "Yes" if question.reference else "No"
        case "vqav2" | "textvqa":
            return question.reference[0]
        case "mmmu":
            answer = question.reference["answer"]
            return answer if isinstance(answer, str) else answer[0]
        case _:
            return question.reference.capitalize()


# ---- resuming and sharing


def test_an_interrupted_run_goes_on(omni, published, tmp_path, monkeypatch):
    whole = evaluate(omni, "pope", published["pope"], tmp_path / "whole", max_new_tokens=3)
    file = tmp_path / "part" / "answers.jsonl"
    evaluate(omni, "pope", published["pope"], file.parent, max_new_tokens=3)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:4]) + lines[4][:12])  # killed while it wrote its fifth answer
    asked = []
    original = OmniMamba.answer
    monkeypatch.setattr(
        OmniMamba, "answer", lambda self, features, texts, **more: asked.extend(texts) or original(self, features, texts, **more)
    )
    part = evaluate(omni, "pope", published["pope"], file.parent, max_new_tokens=3)
    assert sum(map(len, asked)) == 8
    assert part.to_dict() == whole.to_dict()
    asked.clear()
    assert evaluate(omni, "pope", published["pope"], file.parent, max_new_tokens=3).to_dict() == whole.to_dict()
    assert not asked


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 2}, "max_new_tokens 3 instead of 2"),
        ({"limit": 1}, "limit None instead of 1, questions"),
        ({"name": "gqa"}, "benchmark 'pope'"),
    ],
)
def test_answers_of_another_run_are_refused(omni, published, tmp_path, changes, message):
    evaluate(omni, "pope", published["pope"], tmp_path, max_new_tokens=3)
    settings = {"name": "pope", "max_new_tokens": 3} | changes
    name = settings.pop("name")
    with pytest.raises(ValueError, match=message):
        evaluate(omni, name, published[name], tmp_path, **settings)


def test_shards_together_give_the_whole(omni, published, tmp_path):
    whole = evaluate(omni, "mme", published["mme"], tmp_path / "whole", max_new_tokens=2)
    for i in (1, 2, 3):
        assert evaluate(omni, "mme", published["mme"], tmp_path / "parts", shard=Shard(i, 3), max_new_tokens=2) is None
        if i == 2:
            with pytest.raises(ValueError, match="8 of 28 questions have no answer, e.g. position"):
                merge(published["mme"], [tmp_path / "parts"], tmp_path / "parts")
    merged = merge(published["mme"], [tmp_path / "parts"], tmp_path / "parts")
    assert merged.to_dict() == whole.to_dict()
    assert json.loads((tmp_path / "parts/report.json").read_text()) == json.loads((tmp_path / "whole/report.json").read_text())


def test_merge_refuses_what_does_not_belong_together(omni, published, folder_of, tmp_path):
    evaluate(omni, "gqa", published["gqa"], tmp_path / "a", max_new_tokens=2)
    evaluate(omni, "gqa", published["gqa"], tmp_path / "b", max_new_tokens=3)
    with pytest.raises(ValueError, match="of another run than"):
        merge(published["gqa"], [tmp_path / "a", tmp_path / "b"], tmp_path)
    with pytest.raises(ValueError, match="no answers\\*"):
        merge(published["gqa"], [tmp_path], tmp_path)
    data = folder_of("gqa")
    file = data / "testdev_balanced_questions.json"
    file.write_text(file.read_text().replace("overcast", "sunny"))
    with pytest.raises(ValueError, match="other questions than"):
        merge(data, [tmp_path / "a"], tmp_path)


def test_a_prompt_past_the_position_table_is_counted(omni, folder_of, tmp_path):
    data = folder_of("textvqa")
    file = data / "TextVQA_Rosetta_OCR_v0.2_val.json"
    file.write_text(file.read_text().replace('"STOP"', '"' + "STOP " * 300 + '"'))
    report = evaluate(omni, "textvqa", data, tmp_path / "out", max_new_tokens=2)
    assert report.protocol["num_past_last_position"] == 1


# ---- what is missing or malformed


@pytest.mark.parametrize(
    ("name", "lost", "message"),
    [
        ("pope", "coco_pope_popular.json", r"POPE lacks coco_pope_popular\.json \(from https://github\.com/RUCAIBox/POPE"),
        ("pope", "val2014/COCO_val2014_000000000001.jpg", r"POPE lacks 1 of 2 images, e\.g\. val2014/COCO_\S+ \(from http://images"),
        ("mme", "OCR/0001.txt", r"OCR: MME lacks the questions"),
        ("mme", "posters/images/0001.jpg", r"MME lacks 1 of 14 images, e\.g\. posters/images/0001\.jpg"),
        ("gqa", "testdev_balanced_questions.json", r"GQA lacks testdev_balanced_questions\.json \(from https://downloads"),
        ("vqav2", "v2_OpenEndedQuestions_mscoco_test-dev2015_questions.json", r"VQAv2 lacks v2_OpenEnded\S+ \(from https://visualqa"),
        ("textvqa", "TextVQA_Rosetta_OCR_v0.2_val.json", r"TextVQA lacks TextVQA_Rosetta\S+ \(from https://textvqa"),
        ("mmmu", "Music/validation-00000-of-00001.parquet", r"MMMU lacks Music/validation-\*\.parquet \(from https://huggingface"),
    ],
)
def test_missing_files_are_named(folder_of, name, lost, message):
    data = folder_of(name)
    (data / lost).unlink()
    with pytest.raises(ValueError, match=message):
        BENCHMARKS[name].questions(data)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_no_folder_no_split_no_limit(tmp_path, published, name):
    with pytest.raises(ValueError, match=f"no such folder; {BENCHMARKS[name].title} is read from"):
        BENCHMARKS[name].questions(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"{BENCHMARKS[name].title} has no split 'tets'"):
        BENCHMARKS[name].questions(published[name], "tets")
    with pytest.raises(ValueError, match="limit=0"):
        BENCHMARKS[name].questions(published[name], limit=0)
    with pytest.raises(ValueError, match="did you mean 'pope'"):
        understanding.benchmark_named("popes")


def test_a_kind_of_mme_is_missing(folder_of):
    data = folder_of("mme")
    (data / "scene").rename(data / "scenes")
    with pytest.raises(ValueError, match="MME lacks the folders scene "):
        BENCHMARKS["mme"].questions(data)


@pytest.mark.parametrize(
    ("name", "file", "old", "new", "message"),
    [
        ("pope", "coco_pope_random.json", '"label": "no"', '"label": "nein"', "line 2: label 'nein'; expected yes or no"),
        ("pope", "coco_pope_random.json", '"label"', '"lable"', "line 1: no label; expected an object with question_id"),
        ("pope", "coco_pope_random.json", "{", "", "line 1: not a JSON object"),
        ("mme", "OCR/0001.txt", "\tNo", " No", "expected two lines of a question, a tab, and Yes or No"),
        ("gqa", "testdev_balanced_questions.json", '"structural"', '"semantic"', "question 20: no structural"),
        ("gqa", "testdev_balanced_questions.json", "{", "", "not JSON .*fetch it again"),
        ("textvqa", "TextVQA_0.5.1_val.json", '"answers"', '"answer"', "question 0: no answers"),
        ("textvqa", "TextVQA_Rosetta_OCR_v0.2_val.json", "0a", "2a", "no words of image 0a"),
    ],
)
def test_malformed_files_are_named(folder_of, name, file, old, new, message):
    data = folder_of(name)
    (data / file).write_text((data / file).read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        BENCHMARKS[name].questions(data)


def test_a_broken_image_is_named(omni, folder_of, tmp_path):
    data = folder_of("gqa")
    (data / "images/n1.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="image 'n1'"):
        evaluate(omni, "gqa", data, tmp_path / "out")


# ---- shards


def test_shard_of_names():
    names = ["a", "b", "a", "c", "d", "e"]
    parts = [Shard(i, 2).of(names) for i in (1, 2)]
    assert parts == [{"a", "c", "e"}, {"b", "d"}]
    assert Shard.parse(" 2/4 ") == Shard(2, 4) and str(Shard(2, 4)) == "2/4"
    for text in ("0/4", "5/4", "4", "a/b", "1/0"):
        with pytest.raises(ValueError, match="pass I/N with I from 1 to N, for example 1/4"):
            Shard.parse(text)


# ---- command line


def test_commands(published, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["eval", "gqa", "--data", str(published["gqa"]), "--max-new-tokens", "2"]
    assert main([*args, "--json", "new/out.json"]) == 0
    out = capsys.readouterr().out
    assert "60.8" in out and "protocol: question + " in out  # the paper's figure, and how ours was taken
    assert json.loads((tmp_path / "new/out.json").read_text()) == json.loads((tmp_path / "runs/eval/gqa/report.json").read_text())
    for part in ("1/2", "2/2"):
        assert main([*args, "--shard", part, "--out", "parts"]) == 0
    assert "omnimamba eval merge parts --data" in capsys.readouterr().out
    assert main(["eval", "merge", "parts", "--data", str(published["gqa"])]) == 0
    assert capsys.readouterr().out == out
    assert main(["eval", "gqa", "--data", str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "GQA is read from a folder with testdev_balanced_questions.json" in error
