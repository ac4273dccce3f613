"""The emoji benchmark from a folder in the data set's format to the report."""

import gzip
import json
import shutil

import pytest

from omnimamba.engine.omnimamba import OmniMamba
from omnimamba.eval.emoji import LABELS, answer_figures, base_caption, evaluate, score
from omnimamba.eval.emoji_set import Drawing, Question, choose_prompts, read_captions, read_drawings, read_questions
from omnimamba.eval.paint import PaintSettings
from omnimamba.eval.report import Report
from omnimamba.eval.scores import Figure
from omnimamba.processor.image import load_image


@pytest.fixture
def run(omni, data, judge_folder):
    def run(**settings):
        return evaluate(omni, data, **{"split": "hidden", "judge": judge_folder, **settings})

    return run


def test_report(run, tmp_path):
    calls = []
    report = run(out=tmp_path / "out", progress=lambda *call: calls.append(call))
    assert list(report.figures) == list(LABELS)
    assert {key: report.figures[key].n for key in ("caption_exact_match", "presence_f1", "presence_random_f1", "vq_psnr", "real_top5")} == {
        "caption_exact_match": 5,
        "presence_f1": 20,
        "presence_random_f1": 10,
        "vq_psnr": 5,
        "real_top5": 5,
    }
    assert report.figures["real_top5"].value == 1  # five captions
    assert 3 < report.figures["vq_psnr"].value < 30
    for stage in ("painting", "judging", "reconstruction", "questions"):
        done, total = zip(*[call[1:] for call in calls if call[0] == stage], strict=True)
        assert (done[0], done[-1]) == (0, total[-1])

    answers = [json.loads(text) for text in (tmp_path / "out/answers.jsonl").read_text().splitlines()]
    assert len(answers) == 45
    assert answers[0].items() >= {"image": "0_noto", "kind": "name", "reference": "red apple", "text": "What is this?"}.items()
    paintings = [json.loads(text) for text in (tmp_path / "out/paintings.jsonl").read_text().splitlines()]
    assert [painting["seed"] for painting in paintings] == [0, 1, 2, 3, 4]
    assert load_image(tmp_path / "out" / paintings[0]["file"]).size == (32, 32)
    assert load_image(tmp_path / "out/grid.png").width > 128

    header, *rows = report.table()
    assert header == ("figure", "value", "95 % interval", "n")
    assert len(rows) == len(LABELS)
    assert report.to_dict()["protocol"]["generation"] == {"guidance_scale": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0}


def test_the_same_call_gives_the_same_figures(run):
    first, second = (
        json.dumps(run(painting=PaintSettings(guidance_scale=2.0, top_k=8), num_prompts=3, seed=4).to_dict(), allow_nan=False)
        for _ in range(2)
    )
    assert first == second
    assert json.loads(first)["protocol"]["generation"]["guidance_scale"] == 2.0


def test_a_perfect_model(run, data, monkeypatch):
    """One that answers as the data do and paints the drawings themselves."""
    drawings = read_drawings(data, "hidden")
    told = iter(question.reference for question in read_questions(data, "hidden", drawings))
    by_caption = {drawing.caption: drawing.image() for drawing in drawings.values()}
    monkeypatch.setattr(OmniMamba, "answer", lambda self, features, texts, **_: [[next(told) for _ in row] for row in texts])
    monkeypatch.setattr(OmniMamba, "generate_image", lambda self, prompts, **_: [by_caption[prompt] for prompt in prompts])
    figures = {key: figure.value for key, figure in run().figures.items()}
    assert figures.pop("vq_psnr") < 30
    halves = {key for key in figures if key.endswith("yes_ratio")}
    zeros = {key for key in figures if key.endswith("unclear")}
    for name in ("top1", "top5", "similarity"):
        assert figures.pop(f"painted_{name}") == figures.pop(f"real_{name}")
    assert figures == {key: 0.5 if key in halves else 0 if key in zeros else 1 for key in figures}


def test_limit_and_no_prompts(omni, data):
    """Without generation no judge is needed; a model that is in no folder has none."""
    report = evaluate(omni, data, split="hidden", limit=2, num_prompts=0)
    assert report.figures["caption_exact_match"].n == report.figures["vq_psnr"].n == 2
    assert report.protocol["num_drawings"] == 2
    assert not any(key.startswith(("painted", "real", "top")) for key in report.figures)
    bare = OmniMamba(omni.bundle)
    with pytest.raises(ValueError, match="limit=0"):
        evaluate(bare, data, split="hidden", limit=0)


# ---- figures


def drawing(caption="red apple", base="red apple", keywords=("fruit", "food", "red")):
    return Drawing("a", b"", caption, base, keywords)


@pytest.mark.parametrize(
    ("kind", "reference", "answer", "expected"),
    [
        ("name", "", "Red apple.", 1),
        ("name", "", "apple", 0),
        ("style", "fluent flat", "Fluent-flat", 1),
        ("group", "Food & Drink", "food & drink", 1),
        ("subgroup", "food-fruit", "food", 0),
        ("presence", "Yes", "yes, it is", 1),
        ("presence", "No", "NO", 1),
        ("presence", "No", "The answer is B", 0),
        ("presence", "Yes", "", 0),
        ("description", "A thing. Keywords: fruit, food.", "A fruit it is.", 0.5),  # the reference does not name `red`
        ("description", "A thing.", "A fruit it is.", None),
    ],
)
def test_score(kind, reference, answer, expected):
    assert score(drawing(), Question("a", kind, "", "?", reference), answer) == expected


@pytest.mark.parametrize(
    ("caption", "base"),
    [
        ("Waving hand: medium-light skin tone", "waving hand"),
        ("woman: dark skin tone, red hair", "woman: red hair"),
        ("couple with heart: woman, man, dark skin tone, light skin tone", "couple with heart: woman, man"),
        ("light skin tone", "light skin tone"),
        ("keycap: #", "keycap: #"),
        ("apple: ", "apple:"),
    ],
)
def test_base_caption(caption, base):
    assert base_caption(caption) == base.rstrip(":")


def test_presence_figures_by_hand():
    """Yes questions: yes, yes, no, unclear. No questions: no, yes, unclear, no."""
    truth, said = ["Yes"] * 4 + ["No"] * 4, ["Yes", "yes, it is", "No", "B", "NO", "Yes", "", "no"]
    asked = [Question(str(i), "presence", "random", "?", reference) for i, reference in enumerate(truth)]
    figures = answer_figures({str(i): drawing() for i in range(8)}, asked, said, 0)
    values = {key.removeprefix("presence_random_"): figure.value for key, figure in figures.items() if "random" in key}
    assert values == {"accuracy": 4 / 8, "precision": 2 / 3, "recall": 2 / 4, "f1": 4 / 7, "yes_ratio": 3 / 8, "unclear": 2 / 8}
    assert all(figures[f"presence_{name}"].value == value for name, value in values.items())
    assert not any("adversarial" in key for key in figures)


def test_an_undefined_figure_is_null():
    figures = answer_figures({"a": drawing()}, [Question("a", "presence", "random", "?", "No")], ["No"], 0)
    assert figures["presence_precision"] == Figure(None, None, None, 1)
    report = Report({}, figures, LABELS)
    assert report.to_dict()["figures"]["presence_f1"]["value"] is None
    assert ("yes/no, precision", "undefined", "", "1") in report.table()


# ---- reading


def test_prompts_prefer_different_base_captions(data):
    drawings = read_drawings(data, "hidden")
    captions = read_captions(data, "hidden", drawings)
    chosen = choose_prompts(drawings, captions, 9)
    assert {caption for _, caption in chosen} == set(captions.values())
    assert len({drawing.base_caption for drawing, _ in chosen[:4]}) == 4
    assert all(drawing.caption == caption for drawing, caption in chosen)
    assert choose_prompts(drawings, dict(reversed(captions.items())), 3) == chosen[:3]


def test_all_files_may_be_plain_or_compressed(data):
    drawings = read_drawings(data, "hidden")
    questions, captions = read_questions(data, "hidden", drawings), read_captions(data, "hidden", drawings)
    file = data / "understanding-hidden.jsonl.gz"
    file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
    file.unlink()
    file = data / "t2i-hidden.jsonl"
    (data / "t2i-hidden.jsonl.gz").write_bytes(gzip.compress(file.read_bytes()))
    file.unlink()
    assert (read_questions(data, "hidden", drawings), read_captions(data, "hidden", drawings)) == (questions, captions)


def test_missing_files_are_named(run, data, judge_folder, omni, tmp_path):
    with pytest.raises(ValueError, match=r"no val-\*\.parquet, no understanding-val\.jsonl, no t2i-val\.jsonl;.* here: hidden$"):
        run(split="val")
    with pytest.raises(ValueError, match="no such folder"):
        evaluate(omni, data / "nowhere")
    (data / "t2i-hidden.jsonl").rename(data / "t2i.jsonl")
    with pytest.raises(ValueError, match=r"data: no t2i-hidden\.jsonl;.*README\.md"):
        run()
    (data / "t2i.jsonl").rename(data / "t2i-hidden.jsonl")
    with pytest.raises(ValueError, match=r"no config\.json, vision\.safetensors, judge\.safetensors.*num_prompts=0"):
        shutil.copy(judge_folder / "tokenizer.json", tmp_path)
        run(judge=tmp_path)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "line 1: not a JSON object"),
        ("[]", "line 1: not a JSON object"),
        ('{"image": "0_noto"}', "expected"),
        ('{"image": "0_noto", "type": "name", "conversations": [{"value": "?"}]}', "expected"),
        ('{"image": "zoo", "type": "name", "conversations": [{"value": "?"}, {"value": "a"}]}', "image 'zoo' is not in"),
        ('{"image": "0_noto", "type": "nam", "conversations": [{"value": "?"}, {"value": "a"}]}', "did you mean 'name'"),
        ('{"image": "0_noto", "type": "presence", "conversations": [{"value": "?"}, {"value": "Yes"}]}', "sampling"),
    ],
)
def test_a_line_that_does_not_fit_is_named(data, record, message):
    (data / "understanding-hidden.jsonl").write_text(record + "\n")
    with pytest.raises(ValueError, match=message):
        read_questions(data, "hidden", read_drawings(data, "hidden"))


def test_captions_that_do_not_fit_are_named(data):
    for record in ('{"image": "zoo", "captions": ["a"]}', '{"image": "0_noto", "captions": []}'):
        (data / "t2i-hidden.jsonl").write_text(record)
        with pytest.raises(ValueError, match="t2i-hidden.jsonl line 1: expected"):
            read_captions(data, "hidden", read_drawings(data, "hidden"))
