"""Recipes: every shipped one is read, and what cannot run is refused in one line that names the remedy."""

import re
from pathlib import Path

import pytest

from omnimamba.data.augment import Augmentation
from omnimamba.train.config import Recipe, Train, read_recipe
from omnimamba.train.stages import LORA_STAGES, STAGES

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.toml"))
TOKENIZER = 'kind = "tokenizer"\npreset = "tiny"\n'
VQ = 'kind = "vq"\npreset = "tiny"\n[train]\nsteps = 10\nlr = 1e-3\nbatch = 4\n'
TOWER = VQ.replace('"vq"', '"tower"') + '[init]\ntokenizer = "tokenizer.json"\n'
STAGE2 = (
    'kind = "omnimamba"\npreset = "tiny"\n[train]\nstage = "stage2"\nsteps = 10\nlr = 1e-3\nmmu_batch = 4\nt2i_batch = 4\n'
    '[data]\ncaptions = "c"\nconversations = "c"\n[init]\nvq = "vq"\n'
)


@pytest.fixture
def read(tmp_path):
    """read(TOML text, *overrides) of a recipe file my/recipe.toml."""

    def read(text, *overrides):
        path = tmp_path / "my" / "recipe.toml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return read_recipe(path, overrides)

    return read


@pytest.mark.parametrize("path", RECIPES, ids=[f"{path.parent.name}/{path.stem}" for path in RECIPES])
def test_every_recipe(path):
    recipe = read_recipe(path)
    assert recipe.out == f"runs/{path.parent.name}/{path.stem}"
    assert recipe.preset == {"ablations": "nano", "finetune": "nano"}.get(path.parent.name, path.parent.name)
    assert f"omnimamba train recipes/{path.parent.name}/{path.name}" in path.read_text()  # its header says how it is run


def test_there_is_a_recipe_for_each_stage_and_both_sizes():
    recipes = [read_recipe(path) for path in RECIPES]
    assert {(r.preset, r.train.stage) for r in recipes if r.kind == "omnimamba"} == {
        (size, stage) for size in ("1.3b", "nano") for stage in STAGES if stage not in LORA_STAGES
    }


@pytest.mark.parametrize(
    ("stage", "lr", "warmup", "steps", "mmu_batch", "t2i_batch"),
    [("stage1_mmu", 1e-3, 100, 5_000, 32, 0), ("stage1_t2i", 8e-4, 1_000, 100_000, 0, 90), ("stage2", 1e-4, 0, 150_000, 3, 48)],
)
def test_hyperparameters_of_the_paper(stage, lr, warmup, steps, mmu_batch, t2i_batch):
    """Table 5 of arXiv 2503.08686; betas, decay and precision from the authors' code."""
    (train,) = (r.train for r in map(read_recipe, RECIPES) if r.preset == "1.3b" and r.train.stage == stage)
    assert (train.lr, train.warmup, train.steps, train.mmu_batch, train.t2i_batch) == (lr, warmup, steps, mmu_batch, t2i_batch)
    assert (train.beta1, train.beta2, train.weight_decay, train.min_lr_ratio, train.precision) == (0.9, 0.95, 0, 0.01, "bf16")
    assert not train.train_backbone


def test_defaults_and_sections(read):
    recipe = read(VQ + "[augment]\nscale = 0.5\n")
    assert recipe.kind == "vq" and recipe.train == Train(steps=10, lr=1e-3, batch=4)
    assert recipe.augment == Augmentation(scale=0.5) and recipe.augment_plain == Augmentation()
    assert recipe.out == "runs/my/recipe"
    assert read('out = "there"\n' + VQ).out == "there"


def test_tokenizer_recipe_needs_no_train_section(read):
    assert read('kind = "tokenizer"\npreset = "nano"\n').train == Train()


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("train.lr=2e-4", "train", "lr", 2e-4),
        ("train.lr = 1", "train", "lr", 1),
        ("data.in_memory=true", "data", "in_memory", True),
        ("data.folder=/some/where", "data", "folder", "/some/where"),
        ('data.folder="/quoted"', "data", "folder", "/quoted"),
        ("data.folder=a=b", "data", "folder", "a=b"),
        ("data.folder=", "data", "folder", ""),
        ('samples.prompts=["red apple", "cat"]', "samples", "prompts", ("red apple", "cat")),
        ("tower.labels={caption = 1.0, style = 2}", "tower", "labels", {"caption": 1.0, "style": 2}),
        ("tower.labels.caption=3", "tower", "labels", {"caption": 3}),
    ],
)
def test_overrides(read, override, section, key, value):
    assert getattr(getattr(read(VQ, override), section), key) == value


def test_overrides_of_the_recipe_itself(read):
    recipe = read(VQ, "preset=nano", "out=here", "train.steps=1", "train.steps=2")
    assert (recipe.preset, recipe.out, recipe.train.steps) == ("nano", "here", 2)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("kind = vq", (), r"recipe.toml: not a TOML recipe \(Invalid value"),
        ('kind = "vq"', (), "recipe.toml: missing preset"),
        ("", (), "recipe.toml: missing kind, preset"),
        (VQ, ("kind=vqq",), "unknown kind 'vqq'; did you mean 'vq'?"),
        (VQ, ("preset=nanno",), "unknown preset 'nanno'; did you mean 'nano'?"),
        (VQ, ("train.step=3",), r"unknown key 'step' in \[train\]; did you mean 'steps'?"),
        (VQ, ("trian.lr=3",), "unknown key 'trian' in .*recipe.toml; did you mean 'train'?"),
        (VQ, ("augment.blur=3",), r"unknown key 'blur' in \[augment\]; "),
        (VQ, ("train.lr",), r"override 'train.lr': expected section.key=value"),
        (VQ, ("=3",), "override '=3': expected section.key=value"),
        (VQ, ("kind.lr=3",), "override 'kind.lr=3': kind is not a section"),
        (VQ, ("train=3",), r"train must be a section, \[train\]"),
        (VQ, ("train.steps=3.5",), r"steps=3.5 in \[train\] is not of type int"),
        (VQ, ("train.steps=true",), r"steps=True in \[train\] is not of type int"),
        (VQ, ("train.lr=fast",), r"lr='fast' in \[train\] is not of type float"),
        (VQ, ("data.folder=3",), r"folder=3 in \[data\] is not of type str"),
        (VQ, ("samples.prompts=red apple",), r"prompts='red apple' in \[samples\] is not of type tuple"),
        (VQ, ("train.steps=0",), "train.steps is missing"),
        (VQ, ("train.lr=0",), "train.lr is missing"),
        (VQ, ("train.lr=-1",), "train.lr=-1; pass 0 or more"),
        (VQ, ("train.log_every=0",), "train.log_every=0; pass 1 or more"),
        (VQ, ("train.ema=1.5",), "train.ema=1.5; pass 0 to 1"),
        (VQ, ("train.precision=fp16",), "train.precision='fp16'; valid: bf16, fp32"),
        (VQ, ("train.batch=0",), "train.batch=0: a vq recipe needs a batch of at least 1"),
        (VQ, ("train.lr=nan",), "train.lr=nan; pass 0 or more"),
        (VQ, ("train.grad_clip=inf",), "train.grad_clip=inf; pass 0 or more"),
        (VQ, ("train.beta1=2.0",), "train.beta1=2.0; pass 0 to 1"),
        (VQ, ("train.seed=-1",), "train.seed=-1; pass 0 or more"),
        (VQ, ("data.images=parqet",), "data.images='parqet'; did you mean 'parquet'"),
        (VQ, ("data.num_threads=0",), "data.num_threads=0; pass 1 or more"),
        (VQ, ("data.joined=7.0",), "data.joined=7.0; pass 0 to 1"),
        (VQ, ("vq.entropy=-1.0",), "vq.entropy=-1.0; pass 0 or more"),
        (VQ, ("tower.labels={}",), "pass a weight of 0 or more for each text column"),
        (VQ, ("tower.labels={caption='much'}",), "pass a weight of 0 or more for each text column"),
        (VQ, ("tower.labels=3",), "tower.labels=3|labels=3"),
        (VQ, ("tower.text_width=33",), "tower.text_width=33 is not a multiple of 32"),
        (VQ, ("samples.prompts=[3]",), "samples.prompts holds 3; pass texts"),
        (VQ, ("init.model=a", "init.backbone=b"), "init.model and init.backbone all say where the model starts"),
        (VQ, ("augment.scale=-1",), "augmentation scale=-1 is negative"),
        (VQ, ("tower.mixup=1", "tower.plain_share=0.6", "tower.collage_share=0.6"), "exceeds 1"),
        (STAGE2, ("data.versions=0",), "data.versions=0; pass 1 or more"),
        (STAGE2, ("data.repeat={name=0}",), "pass a number of 1 or more for each type"),
        (STAGE2, ("data.repeat=2",), "repeat=2"),
        (STAGE2, ("lookalikes.labels=2",), "labels=2"),
        (STAGE2, ("data.versions=2", "data.tokens=x"), "data.versions=2 are made of the images at the start"),
        (VQ, ("tower.collage_share=0.2",), "tower.collage_labels and tower.collage_share belong together"),
        (VQ, ('tower.collage_labels=["style"]',), "tower.collage_labels names style, not in tower.labels; valid: caption"),
        (STAGE2, ("train.stage=stage3",), "unknown train.stage 'stage3'; did you mean 'stage2'?"),
        (STAGE2, ("train.mmu_batch=0",), "train.mmu_batch=0, but stage2 trains mmu and t2i"),
        (STAGE2, ("train.stage=stage1_t2i",), "train.mmu_batch=4, but stage1_t2i trains t2i"),
        (
            STAGE2,
            ("train.train_backbone=true", "preset=1.3b"),
            "train.train_backbone=true is for presets without a pretrained backbone, not for 1.3b",
        ),
        (STAGE2, ("train.stage=lora_t2i", "train.mmu_batch=0"), "lora_t2i trains the LoRA of a finished model: name init.model"),
        (STAGE2, ("init.adapter=folder",), "init.adapter goes into a finished model: name init.model"),
        (STAGE2, ("model.lora.rnk=0",), "unknown key 'rnk' in lora; did you mean 'rank'"),
        (STAGE2, ("model.backbone=8",), "model.backbone=8 is not a section"),
        (STAGE2, ("model=8",), r"model=8 must be a section|override"),
        (STAGE2, ("train.parallel=fdsp",), "train.parallel='fdsp'; did you mean 'fsdp'"),
        (STAGE2, ("train.tracker=wand",), "train.tracker='wand'; did you mean 'wandb'"),
        (STAGE2, ("train.best=mmu",), "train.best='mmu' is a figure of the validation; set train.val_every"),
        (STAGE2, ("train.best_is=low",), "train.best_is='low'; valid: lowest, highest"),
        (STAGE2, ("train.accumulate=0",), "train.accumulate=0; pass 1 or more"),
        (TOWER, ("train.keep_start=0.5",), "train.keep_start=0.5 keeps weights of a finished model: name init.model"),
        (STAGE2, ("train.keep_start=0.5",), "train.keep_start=0.5 keeps weights of a finished model: name init.model"),
        (VQ, ("train.keep_start=0.5", "init.model=folder"), "train.keep_start=0.5 is for omnimamba and tower recipes"),
        (TOKENIZER, ("train.keep_start=0.5",), "a tokenizer is counted, not trained in steps: leave \\[train\\] out of its recipe"),
        (VQ, ("train.graphs=true",), "train.graphs=true is for omnimamba recipes; leave it out of a vq recipe"),
        (VQ, ("data.max_broken=3",), "data.max_broken=3 is for omnimamba recipes; a vq needs all of its images"),
        (STAGE2, ("init.mmu=folder",), "init.mmu and init.t2i belong together"),
        (STAGE2, ("data.captions=",), "stage2 paints: name data.captions"),
        (STAGE2, ("data.conversations=",), "stage2 reads images: name data.conversations"),
        (STAGE2, ("init.vq=",), "stage2 paints: name data.tokens .*, or init.vq"),
    ],
)
def test_what_cannot_run(read, text, overrides, message):
    with pytest.raises(ValueError, match=message) as error:
        read(text, *overrides)
    assert "\n" not in str(error.value)


def test_no_such_recipe(tmp_path):
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path / 'x.toml'))}: no such recipe$"):
        read_recipe(tmp_path / "x.toml")


def test_a_recipe_in_python():
    assert Recipe("vq", "tiny", Train(steps=1, lr=1.0, batch=1)).out == ""
