"""The lmms-eval plug-in: requests as lmms-eval makes them, and its command line over a task of local data.

Where lmms-eval is not installed, the few of its names that the plug-in needs are stood in for, and its command line is not run.
"""

import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import types

import pytest
from PIL import Image

HAS_LMMS_EVAL = importlib.util.find_spec("lmms_eval") is not None
COLOURS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def lmms():
    """The module of the plug-in."""
    if HAS_LMMS_EVAL:
        yield importlib.import_module("omnimamba.eval.lmms")
        return
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stand_in().items():
            patch.setitem(sys.modules, name, module)
        yield importlib.import_module("omnimamba.eval.lmms")
        patch.delitem(sys.modules, "omnimamba.eval.lmms")


def stand_in() -> dict[str, types.ModuleType]:
    """What `api/model.py`, `api/instance.py` and `models/registry_v2.py` of lmms-eval 0.7.3 offer to a model."""

    class Model:
        def __init__(self):
            self._rank, self._world_size, self.task_dict = 0, 1, {}
            self.cache_hook = types.SimpleNamespace(add_partial=lambda *args: None)

        rank = property(lambda self: self._rank)

    manifest = dataclasses.make_dataclass("ModelManifest", ["model_id", ("simple_class_path", str, None)])
    contents = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": Model},
        "lmms_eval.api.instance": {"Instance": object},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": manifest},
    }
    modules = {name: types.ModuleType(name) for name in contents}
    for name, module in modules.items():
        module.__dict__.update(contents[name])
    return modules


@pytest.fixture
def plugged(lmms, folder, tmp_path):
    """A function that makes the model with documents of three plain images, or of no image."""

    def make(**settings):
        model = lmms.OmniMambaLmms(str(folder), device="cpu", **{"batch_size": 2, "out": str(tmp_path / "out"), **settings})
        model.task_dict = {"task": {"test": [{"images": [Image.new("RGB", (40, 40), colour)]} for colour in COLOURS] + [{"images": []}]}}
        return model

    return make


@pytest.fixture(scope="module")
def folder(omni, tmp_path_factory):
    path = tmp_path_factory.mktemp("lmms") / "model"
    omni.save_pretrained(path)
    return path


def request(doc_id, text="What is this?", **settings):
    return types.SimpleNamespace(args=(text, {"max_new_tokens": 6, **settings}, lambda doc: doc["images"], doc_id, "task", "test"))


def test_answers_are_those_of_the_model(plugged, omni):
    model = plugged()
    images = [doc["images"][0] for doc in model.task_dict["task"]["test"][:3]]
    requests = [request(i % 3, text) for i, text in enumerate(["What is this?", "Which style?", "Which group?"] * 4)]
    expected = omni.describe([images[r.args[3]] for r in requests], [r.args[0] for r in requests], max_new_tokens=6)
    assert model.generate_until(requests) == expected


def test_without_an_image(plugged):
    model = plugged()
    with_image, without = model.generate_until([request(0), request(3)])
    assert isinstance(without, str) and model.generate_until([request(3), request(0)]) == [without, with_image]


def test_further_images_are_counted(plugged, caplog):
    model = plugged()
    documents = model.task_dict["task"]["test"]
    documents[1]["images"] *= 3
    with caplog.at_level("WARNING", "omnimamba"):
        assert len(model.generate_until([request(0), request(1)])) == 2
    assert caplog.messages == ["1 of 2 requests have several images; the model saw the first of each"]


def test_an_answer_ends_where_the_task_says(plugged):
    model = plugged()
    (whole,) = model.generate_until([request(0, max_new_tokens=12)])
    middle = whole[len(whole) // 2]
    (cut,) = model.generate_until([request(0, max_new_tokens=12, until=[middle, ""])])
    assert cut == whole.split(middle)[0].strip() != whole
    assert model.generate_until([request(0, max_new_tokens=12, until=middle)]) == [cut]


def test_sampling(lmms):
    assert lmms.sampling_of({}).temperature == 0 and lmms.sampling_of({}).max_new_tokens == 128
    assert lmms.sampling_of({"temperature": 0.7, "do_sample": False}).temperature == 0
    drawn = lmms.sampling_of({"temperature": 0.7, "top_p": 0.9, "do_sample": True, "num_beams": 1})
    assert (drawn.temperature, drawn.top_p) == (0.7, 0.9)
    with pytest.raises(ValueError, match="num_beams=3: there is no beam search"):
        lmms.sampling_of({"num_beams": 3})


def test_painting(plugged, omni):
    model = plugged(mode="generate", seed=5)
    replies = [json.loads(reply) for reply in model.generate_until([request(2, "red apple"), request(0, "hand")])]
    files = [reply["images"][0] for reply in replies]
    assert [os.path.basename(file) for file in files] == ["00002.png", "00000.png"] and {reply["text"] for reply in replies} == {""}
    with Image.open(files[0]) as image:
        assert image.tobytes() == omni.generate_image("red apple", seed=7)[0].tobytes()


def test_guided_painting_one_by_one(plugged):
    model = plugged(mode="generate", guidance_scale=2, batch_size=1)
    (reply,) = model.generate_until([request(0, "red apple")])
    assert os.path.isfile(json.loads(reply)["images"][0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"mode": "edit"}, "unknown mode 'edit'"), ({"batch_size": "auto"}, "batch_size='auto'"), ({"batch_size": 0}, "batch_size=0")],
)
def test_bad_arguments(plugged, settings, message):
    with pytest.raises(ValueError, match=message):
        plugged(**settings)


def test_what_is_not_offered(plugged):
    model = plugged()
    with pytest.raises(NotImplementedError, match="loglikelihood"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="multi-round"):
        model.generate_until_multi_round([])


def test_manifest(lmms):
    manifest = lmms.manifest()
    assert (manifest.model_id, manifest.simple_class_path) == ("omnimamba", "omnimamba.eval.lmms.OmniMambaLmms")


TASK = """\
task: tiny_colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 4, temperature: 0, do_sample: false}}
process_results: !function utils.process_results
metric_list:
  - {{metric: is_text, aggregation: mean, higher_is_better: true}}
"""
UTILS = """\
from PIL import Image


def doc_to_visual(doc):
    return [Image.new("RGB", (40, 40), doc["colour"])]


def process_results(doc, results):
    return {"is_text": float(isinstance(results[0], str))}
"""


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LMMS_EVAL, reason="lmms-eval is not installed; pip install 'omnimamba[eval]'")
def test_command_line_of_lmms_eval(folder, tmp_path):
    data = tmp_path / "test.jsonl"
    lines = [{"question": f"Is it {colour}?", "answer": "yes", "colour": colour} for colour in COLOURS]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "task").mkdir()
    (tmp_path / "task/tiny_colours.yaml").write_text(TASK.format(data=data))
    (tmp_path / "task/utils.py").write_text(UTILS)
    command = [sys.executable, "-m", "lmms_eval", "--model", "omnimamba", "--model_args", f"pretrained={folder},device=cpu"]
    command += ["--tasks", "tiny_colours", "--include_path", str(tmp_path / "task"), "--batch_size", "2"]
    command += ["--output_path", str(tmp_path / "out"), "--log_samples"]
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "out").rglob("*_results.json")
    assert json.loads(file.read_text())["results"]["tiny_colours"]["is_text,none"] == 1
