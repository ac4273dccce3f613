"""A tiny random model in a folder with a judge, a tiny data set in the format of the emoji data set, and tiny benchmark folders."""

import dataclasses
import gzip
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from tokenizers import Tokenizer, pre_tokenizers

from omnimamba.config import SPECIAL_TOKENS, preset
from omnimamba.data.prepare import train_text_tokenizer
from omnimamba.engine.omnimamba import OmniMamba
from omnimamba.eval import mme, mmmu
from omnimamba.model.contrastive import ContrastiveHeads

DRAWINGS = [
    # name, base name, keywords, colour
    ("red apple", "red apple", ["fruit", "red"], "red"),
    ("hand: dark skin tone", "hand", ["palm", "five fingers"], "brown"),
    ("hand: light skin tone", "hand", ["palm", "five fingers"], "tan"),
    ("keycap: #", "keycap: #", [], "blue"),
    ("keycap: *", "keycap: *", ["star key"], "navy"),
]
QUESTIONS = {"name": "What is this?", "style": "Which style?", "group": "Which group?", "subgroup": "Which subgroup?"}


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tokenizer.json"
    train_text_tokenizer([*(row[0] for row in DRAWINGS), *QUESTIONS.values()] * 2, 311).save(str(path))
    return path


@pytest.fixture(scope="session")
def omni(tokenizer_file):
    base = Tokenizer.from_file(str(tokenizer_file)).get_vocab_size()
    rows = -(-(base + len(SPECIAL_TOKENS)) // 16) * 16
    config = dataclasses.replace(preset("tiny"), base_vocab_size=base, text_vocab_size=rows, max_caption_tokens=24, mmu_positions=250)
    return OmniMamba.from_config(config, tokenizer_file=tokenizer_file)


@pytest.fixture(scope="session")
def judge_folder(omni, tokenizer_file):
    """The model's folder, with what a judge needs."""
    folder = tokenizer_file.parent
    (folder / "config.json").write_text(json.dumps(omni.config.to_dict()))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        heads = ContrastiveHeads(omni.config.vision_dim, omni.config.text_vocab_size, dim=16, text_width=32)
    save_file({key: value.contiguous() for key, value in omni.vision.state_dict().items()}, folder / "vision.safetensors")
    save_file(heads.state_dict(), folder / "judge.safetensors")
    return folder


def webp(colour: str) -> bytes:
    image = Image.new("RGB", (40, 40), "white")
    ImageDraw.Draw(image).ellipse((8, 8, 32, 32), fill=colour)
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=True)
    return file.getvalue()


def line(image: str, kind: str, question: str, answer: str, **more: str) -> str:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return json.dumps({"id": f"{image}#{kind}", "image": image, "conversations": turns, "type": kind, **more}) + "\n"


def write_split(folder, split: str) -> None:
    """Drawings in two Parquet files, questions as .jsonl.gz, captions as .jsonl."""
    rows, questions, captions = [], "", ""
    for i, (caption, base, keywords, colour) in enumerate(DRAWINGS):
        name = f"{i}_noto"
        image = {"bytes": webp(colour), "path": f"{name}.webp"}
        more = {"style": "noto", "group": "Food & Drink", "subgroup": "food-fruit", "skin_tone_variant": base != caption}
        rows.append({"image": image, "id": name, "caption": caption, "base_caption": base, "keywords": keywords, "split": split, **more})
        captions += json.dumps({"image": name, "captions": [caption, f"a {caption}, noto style"]}) + "\n"
        for kind, answer in (("name", caption), ("style", "noto"), ("group", "Food & Drink"), ("subgroup", "food-fruit")):
            questions += line(name, kind, QUESTIONS[kind], answer)
        for sampling in ("random", "adversarial"):
            questions += line(name, "presence", f"Is it a {caption}?", "Yes", sampling=sampling)
            questions += line(name, "presence", "Is it a zoo?", "No", sampling=sampling)
        questions += line(name, "description", "Describe it.", f"A {caption}. Keywords: {', '.join(keywords)}.")
    for part, some in enumerate((rows[:3], rows[3:])):
        schema = None if part == 0 else pq.read_schema(folder / f"{split}-00000-of-00002.parquet")
        pq.write_table(pa.Table.from_pylist(some, schema), folder / f"{split}-0000{part}-of-00002.parquet")
    (folder / f"understanding-{split}.jsonl.gz").write_bytes(gzip.compress(questions.encode()))
    (folder / f"t2i-{split}.jsonl").write_text(captions)


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_split(folder, "hidden")
    return folder


@pytest.fixture
def noise():
    """Pictures of noise, one a seed."""
    return lambda seed: Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8))


# ---- benchmark folders in the published formats: a handful of questions about plain pictures


def picture(path: Path, colour: str = "red", size: tuple[int, int] = (48, 40)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def encoded(path: Path) -> dict[str, object]:
    return {"bytes": path.read_bytes(), "path": path.name}


def write_pope(folder: Path) -> None:
    for sampling in ("random", "popular", "adversarial"):
        lines = []
        for i in range(2):
            image = f"COCO_val2014_{i:012}.jpg"
            picture(folder / "val2014" / image, ("red", "blue")[i])
            for text, label in (("Is there a person in the image?", "yes"), ("Is there a dog in the image?", "no")):
                lines.append({"question_id": len(lines) + 1, "image": image, "text": text, "label": label})
        (folder / f"coco_pope_{sampling}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_mme(folder: Path) -> None:
    for kind in (*mme.PERCEPTION, *mme.COGNITION):
        has_subfolders = kind in ("posters", "artwork")
        images, texts = (folder / kind / name if has_subfolders else folder / kind for name in ("images", "questions_answers_YN"))
        texts.mkdir(parents=True, exist_ok=True)
        picture(images / ("0001.png" if kind == "count" else "0001.jpg"))
        lines = ("Is this red? Please answer yes or no.\tYes\n", "Is this blue?  Please answer yes or no.\tNo\n")
        (texts / "0001.txt").write_text("".join(lines))


def write_gqa(folder: Path) -> None:
    questions = {}
    for i, (structure, text, answer) in enumerate(
        [("verify", "Is it overcast?", "no"), ("query", "Which color is it?", "red"), ("choose", "Is it red or blue?", "blue")]
    ):
        picture(folder / "images" / f"n{i // 2}.jpg")
        questions[f"2{i}"] = {"imageId": f"n{i // 2}", "question": text, "answer": answer, "types": {"structural": structure}}
    for split in ("testdev_balanced", "val_balanced"):
        (folder / f"{split}_questions.json").write_text(json.dumps(questions))


def write_vqav2(folder: Path) -> None:
    questions, annotations = [], []
    for i, (text, kind, answer) in enumerate(
        [("Is it red?", "yes/no", "yes"), ("How many?", "number", "2"), ("What is it?", "other", "a stop sign")]
    ):
        for image_set in ("val2014", "test2015"):
            picture(folder / image_set / f"COCO_{image_set}_{i // 2 + 7:012}.jpg")
        questions.append({"question_id": 100 + i, "image_id": i // 2 + 7, "question": text})
        answers = [{"answer_id": k, "answer": answer, "answer_confidence": "yes"} for k in range(1, 11)]
        annotations.append({"question_id": 100 + i, "answers": answers, "answer_type": kind, "multiple_choice_answer": answer})
    for name, some in {"val2014": questions, "test-dev2015": questions[:2], "test2015": questions}.items():
        (folder / f"v2_OpenEndedQuestions_mscoco_{name}_questions.json").write_text(json.dumps({"questions": some}))
    (folder / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": annotations}))


def write_textvqa(folder: Path) -> None:
    records, ocr = [], []
    for i, (text, words) in enumerate([("what does it say?", ["STOP"]), ("what brand is it?", ["Coca", "Cola"])]):
        picture(folder / "train_images" / f"{i}a.jpg")
        records.append({"question_id": 30 + i, "image_id": f"{i}a", "question": text, "answers": [" ".join(words).lower()] * 10})
        ocr.append({"image_id": f"{i}a", "ocr_tokens": words})
    (folder / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": records}))
    (folder / "TextVQA_Rosetta_OCR_v0.2_val.json").write_text(json.dumps({"data": ocr}))


def mmmu_row(subject: str, number: int, picture_file: Path, **changes) -> dict[str, object]:
    row = {
        "id": f"validation_{subject}_{number}",
        "question": "What is in <image 1>?",
        "options": "['a red square', '<image 2>']",
        "explanation": "",
        "answer": "A",
        "question_type": "multiple-choice",
        "subfield": "Any",
    }
    return row | {f"image_{i}": encoded(picture_file) if i <= 2 else None for i in range(1, 8)} | changes


def write_mmmu(folder: Path) -> None:
    file = picture(folder / "square.png")
    for subject in (subject for some in mmmu.DISCIPLINES.values() for subject in some):
        rows = [mmmu_row(subject, 1, file)]
        if subject == "Math":
            rows.append(mmmu_row(subject, 2, file, options="[]", answer="['1,200', '1200 m']", question_type="open", image_2=None))
        struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        table = pa.table({key: pa.array([row[key] for row in rows], struct if key.startswith("image") else pa.string()) for key in rows[0]})
        (folder / subject).mkdir()
        for split in ("validation", "dev"):
            pq.write_table(table, folder / subject / f"{split}-00000-of-00001.parquet")
    file.unlink()


WRITERS = {
    "pope": write_pope,
    "mme": write_mme,
    "gqa": write_gqa,
    "vqav2": write_vqav2,
    "textvqa": write_textvqa,
    "mmmu": write_mmmu,
}


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """A small folder of each benchmark, by its name."""
    folders = {}
    for name, write in WRITERS.items():
        folders[name] = tmp_path_factory.mktemp(name)
        write(folders[name])
    return folders


@pytest.fixture
def folder_of(published, tmp_path):
    """A copy of a benchmark's folder, to change."""
    return lambda name: shutil.copytree(published[name], tmp_path / name)


# ---- networks of random weights


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """A file as torch-fidelity's Inception weights, of random values."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Fresh(FeatureExtractorInceptionV3):
        def load_state_dict(self, *args):
            """Leaves the random start as it is."""

    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "empty.pth")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Fresh("fresh", ["2048"], feature_extractor_weights_path=folder / "empty.pth")
        for name, parameter in network.named_parameters():
            if name.endswith("conv.weight"):
                torch.nn.init.kaiming_normal_(parameter, nonlinearity="relu")  # else features vanish on the way
    torch.save(network.state_dict(), folder / "inception.pth")
    return folder / "inception.pth"


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A tiny CLIP model of random weights, with its tokenizer."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

    folder = tmp_path_factory.mktemp("clip")
    symbols = pre_tokenizers.ByteLevel.alphabet()
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 16}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    text = CLIPTextConfig(vocab_size=len(words), max_position_embeddings=20, **ends, **sizes)
    vision = CLIPVisionConfig(image_size=32, patch_size=8, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16))
    model.save_pretrained(folder)
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=20).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def coco(tmp_path_factory):
    """A folder in MS-COCO's format: four images with two captions each."""
    folder = tmp_path_factory.mktemp("coco")
    images, annotations = [], []
    for i, colour in enumerate(("red", "green", "blue", "white")):
        name = f"COCO_val2014_{i:012}.jpg"
        picture(folder / "val2014" / name, colour, (60, 48))
        images.append({"id": i, "file_name": name, "height": 48, "width": 60})
        for text in (f"A {colour} wall.", f" Something {colour}. "):
            annotations.append({"image_id": i, "id": len(annotations), "caption": text})
    (folder / "annotations").mkdir()
    (folder / "annotations/captions_val2014.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder


@pytest.fixture(scope="session")
def geneval(tmp_path_factory):
    """A folder with GenEval's prompts: three of two kinds."""
    folder = tmp_path_factory.mktemp("geneval")
    prompts = [("single_object", "a photo of a bench"), ("single_object", "a photo of a cow"), ("counting", "a photo of two cups")]
    records = [{"tag": tag, "include": [{"class": text.split()[-1], "count": 1}], "prompt": text} for tag, text in prompts]
    (folder / "evaluation_metadata.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder
