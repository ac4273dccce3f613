"""From a recipe file to a finished model: the tokenizer, and the whole chain of the nano recipes at tiny size."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from omnimamba.config import preset
from omnimamba.engine.omnimamba import OmniMamba
from omnimamba.eval.judge import Judge
from omnimamba.processor.tokenizer import TextTokenizer
from omnimamba.train.run import nearest_file, train

RECIPES = Path(__file__).parents[2] / "recipes" / "nano"


def test_tokenizer(data_folder, tmp_path):
    overrides = ["preset=tiny", f"data.folder={data_folder}", f"out={tmp_path}"]
    folder = train(RECIPES / "1-tokenizer.toml", overrides)
    assert folder == tmp_path / "model" and [path.name for path in folder.iterdir()] == ["tokenizer.json"]
    tok = TextTokenizer.from_file(folder / "tokenizer.json", preset("tiny"))
    assert tok.decode(tok.encode("What is this? A red circle.")) == "What is this? A red circle."
    with pytest.raises(ValueError, match="tokens, 50277 are wanted; add texts or lower the vocabulary"):
        train(RECIPES / "1-tokenizer.toml", [*overrides, "preset=1.3b"])
    few = train(RECIPES / "1-tokenizer.toml", [*overrides, "data.conversations=understanding-train.jsonl", "data.captions="])
    assert Tokenizer.from_file(str(few / "tokenizer.json")).get_vocab_size() == 2038


def test_every_kind_by_its_recipe_file(data_folder, tmp_path):
    recipe = tmp_path / "short.toml"
    recipe.write_text('kind = "vq"\npreset = "tiny"\n[train]\nsteps = 1\nlr = 1e-3\nbatch = 2\nprecision = "fp32"\n')
    folder = train(recipe, [f"data.folder={data_folder}", f"out={tmp_path / 'run'}"], device="cpu")
    assert (folder / "vq.safetensors").is_file()
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        train(recipe, device="gpu")


def test_the_whole_chain(data_folder, tmp_path, monkeypatch):
    """Every recipe of recipes/nano with its own settings but for size, steps and batches; each finds what those before it made."""
    monkeypatch.chdir(tmp_path)  # they name each other by relative paths
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "emoji").symlink_to(data_folder)
    batches = {
        "2-vq": ["train.batch=4"],
        "3-tower": ["train.batch=6"],
        "3b-tower-styles": ["train.batch=6"],
        "5-stage1-mmu": ["train.mmu_batch=4"],
        "4-stage1-t2i": ["train.t2i_batch=4"],
        "6-stage2": ["train.mmu_batch=4", "train.t2i_batch=4"],
    }
    few = ["train.steps=4", "train.log_every=1", "train.val_every=2", "train.save_every=2"]
    for path in sorted(RECIPES.glob("*.toml")):
        overrides = ["preset=tiny"]
        if path.stem in batches:
            overrides += [*few, *batches[path.stem]]
        if "stage" in path.stem:
            overrides += ["data.kinds=[]", "train.sample_every=4", 'samples.prompts=["red circle", "blue line"]', "samples.num_images=2"]
        folder = train(path, overrides, device="cpu")
        assert folder.resolve() == tmp_path / "runs" / "nano" / path.stem / "model"

    model = OmniMamba.from_pretrained("runs/nano/6-stage2/model", device="cpu")
    image = model.generate_image("red circle", seed=0)[0]
    assert image.size == (32, 32) and model.defaults.guidance_scale > 1
    assert isinstance(model.describe(image, "What is this?", max_new_tokens=8), str)
    assert Judge.load(Path("runs/nano/6-stage2/model")).similarities([image], ["red circle"]).shape == (1, 1)
    for name in ("painted.png", "described.txt"):
        assert (tmp_path / "runs/nano/6-stage2/samples/step-00000004" / name).is_file()
    model.save_pretrained("again")
    again = OmniMamba.from_pretrained("again", device="cpu").bundle.model.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.bundle.model.state_dict().items())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.folder=/none", "data.folder=/none: no such folder; "),
        ("data.captions=t2i-{split}.json", "data.captions: .*t2i-train.json: no such file; did you mean 't2i-train.jsonl'"),
        ("data.conversations=talk.json", "data.conversations: .*talk.json: no such file; "),
        ("data.val_split=vol", "data.conversations: .*understanding-vol.jsonl: no such file; did you mean 'understanding-val.jsonl.gz'"),
        ("data.tokens=tokens.parquet", "data.tokens: .*tokens.parquet: no such file; "),
        (
            "init.vq=/none/vq.safetensors",
            "init.vq=/none/vq.safetensors: no such file; there is no folder /none either. The recipe",
        ),
        ("init.vision={encoders}/vison.safetensors", "init.vision=.*: no such file; did you mean 'vision.safetensors'"),
        ("init.model=no/such/folder/", "there is no file or folder 'no/such/folder/'"),
        ("init.model=tiny", "'tiny' is a preset, a shape without weights"),
        ("train.t2i_batch=0", "train.t2i_batch=0, but stage2 trains mmu and t2i"),
    ],
)
def test_what_is_missing_is_said_before_a_model_is_built(plain_stage2, encoders, monkeypatch, override, message):
    monkeypatch.setattr("omnimamba.train.omnimamba.OmniMambaModel", None)
    with pytest.raises(ValueError, match=message) as error:
        train(plain_stage2, [override.replace("{encoders}", str(encoders))], device="cpu")
    assert "\n" not in str(error.value)


def test_a_validation_on_the_training_file_is_refused(plain_stage2):
    """In a folder of images nothing else would tell the splits apart."""
    with pytest.raises(ValueError, match=r"data.captions=t2i-train.jsonl is the validation's, too; .* as in t2i-train-{split}.jsonl"):
        train(plain_stage2, ["data.images=folder", "data.captions=t2i-train.jsonl"], device="cpu")


def test_what_lies_where_a_file_is_missing(tmp_path):
    assert nearest_file(tmp_path / "x") == f"the folder {tmp_path} is empty"
    for i in range(70):
        (tmp_path / f"{i:02}.png").touch()
    hint = nearest_file(tmp_path / "captions")
    assert hint.startswith("valid: 00.png, 01.png, ") and hint.endswith("59.png and 10 more")
