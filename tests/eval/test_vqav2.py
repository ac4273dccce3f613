"""VQAv2: what goes to the evaluation server, and figures by type of answer."""

import pytest

from omnimamba.eval.vqav2 import BENCHMARK, QUESTION_SETS, figures, questions_file, upload


def test_upload_holds_normalised_answers_to_all_of_the_test_set(folder_of):
    data = folder_of("vqav2")
    questions = BENCHMARK.questions(data, "test-dev")
    answers = ["Yes, it is.", "Two"]
    given = [{"question_id": 100, "answer": "yes it is"}, {"question_id": 101, "answer": "2"}]
    assert upload(data, "test-dev", questions, answers) == [*given, {"question_id": 102, "answer": ""}]
    (data / questions_file("test")).unlink()
    assert upload(data, "test-dev", questions, answers) == given
    assert upload(data, "val", questions, answers) is None


def test_figures_by_type(published):
    questions = BENCHMARK.questions(published["vqav2"], "val")
    values = {key: figure.value for key, figure in figures(questions, ["no", "two", "stop sign!"], 0).items()}
    assert values == pytest.approx({"accuracy": 2 / 3, "yes/no": 0, "number": 1, "other": 1})
    assert figures(BENCHMARK.questions(published["vqav2"], "test-dev"), ["no", "two"], 0) == {}


def test_annotations_of_other_questions(folder_of):
    data = folder_of("vqav2")
    file = data / "v2_mscoco_val2014_annotations.json"
    file.write_text(file.read_text().replace('"question_id": 101', '"question_id": 999'))
    with pytest.raises(ValueError, match="no annotation of question 101"):
        BENCHMARK.questions(data, "val")
    assert set(QUESTION_SETS) == set(BENCHMARK.splits)
