"""Figures as a table and as JSON."""

import json

from omnimamba.eval.report import Report
from omnimamba.eval.scores import Figure

FIGURES = {"f1": Figure(0.5, 0.25, 0.75, 4), "count_acc": Figure(None, None, None, 0), "fid": Figure(5.5, None, None, 3)}


def test_table():
    report = Report({}, FIGURES, labels={"f1": "F1"}, forms={"fid": "{:.2f}"})
    assert report.table() == [
        ("figure", "value", "95 % interval", "n"),
        ("F1", "50.0%", "25.0% to 75.0%", "4"),
        ("count acc", "undefined", "", "0"),
        ("fid", "5.50", "", "3"),
    ]


def test_the_papers_figures_are_a_last_column():
    rows = Report({}, FIGURES, paper={"f1": "86.3"}).table()
    assert [row[-1] for row in rows] == ["paper", "86.3", "", ""]


def test_json_has_the_answers_where_there_are_some():
    assert set(Report({"a": 1}, FIGURES).to_dict()) == {"protocol", "figures"}
    values = json.loads(json.dumps(Report({"a": 1}, FIGURES, answers=[{"id": "x"}]).to_dict(), allow_nan=False))
    assert values["answers"] == [{"id": "x"}] and values["figures"]["count_acc"]["value"] is None
