"""The user's class: captions to images, images to text, conversations, defaults and errors."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from omnimamba.config import Task
from omnimamba.engine.omnimamba import GenerationDefaults, OmniMamba, resolve_device, resolve_dtype
from omnimamba.engine.request import Request, SamplingParams

SIZE = 32


@pytest.fixture(scope="module")
def omni(config, tokenizer_file, liven):
    omni = OmniMamba.from_config(config, tokenizer_file=tokenizer_file, num_slots=6)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(4)
        liven(omni.bundle.model)
    return omni


@pytest.fixture(scope="module")
def picture():
    """Pictures of noise, one a seed."""
    return lambda seed: Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8))


def same(first, second):
    return all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))


def differing_rows(first, second):
    """Top and bottom of the rows where two images differ; None if nowhere."""
    box = ImageChops.difference(first, second).getbbox()
    return box and (box[1], box[3])


# ---- text to image


def test_images_are_prompt_major_and_independent_of_the_batch(omni):
    images = omni.generate_image(["a red apple", "a zoo"], num_images=3, seed=5)
    assert [image.size for image in images] == [(SIZE, SIZE)] * 6
    assert same(images[:3], omni.generate_image("a red apple", num_images=3, seed=5))
    assert same(images[3:4], omni.generate_image("a zoo", seed=5))
    assert len({image.tobytes() for image in images}) == 6
    assert all(image.info["seed"] == 5 for image in images)


def test_more_images_than_slots(omni, config, tokenizer_file):
    """The pool has 6 slots, so 3 guided images run at once."""
    images = omni.generate_image("a zoo", num_images=8, guidance_scale=2.0, seed=1)
    large = OmniMamba(omni.bundle, num_slots=16)
    assert same(images, large.generate_image("a zoo", num_images=8, guidance_scale=2.0, seed=1))


def test_a_seed_for_each_prompt(omni):
    images = omni.generate_image(["a zoo", "a zoo", "a red apple"], num_images=2, seed=[3, 4, 3])
    assert [image.info["seed"] for image in images] == [3, 3, 4, 4, 3, 3]
    assert same(images[2:4], omni.generate_image("a zoo", num_images=2, seed=4))
    assert same(images[4:], omni.generate_image("a red apple", num_images=2, seed=3))
    with pytest.raises(ValueError, match="2 seeds for 1 prompts"):
        omni.generate_image("a zoo", seed=[3, 4])


def test_a_drawn_seed_is_reported(omni):
    first, second = omni.generate_image(["a zoo", "a zoo"])
    assert first.info["seed"] != second.info["seed"]
    assert same([first], omni.generate_image("a zoo", seed=first.info["seed"]))


def test_no_prompts_no_images(omni):
    assert omni.generate_image([]) == []


def test_partial_images(omni):
    calls = []
    images = omni.generate_image(["a red apple", "a zoo"], seed=3, callback=lambda *call: calls.append(call))
    for image_idx, image in enumerate(images):
        partial = [(picture, fraction) for i, picture, fraction in calls if i == image_idx]
        assert [fraction for _, fraction in partial] == [i / 8 for i in range(1, 9)]
        assert same([partial[-1][0]], [image])
        for num_rows, (picture, _) in enumerate(partial[:-1], 1):
            grey = picture.crop((0, 4 * num_rows, SIZE, SIZE))
            assert grey.getcolors() == [(grey.width * grey.height, (128, 128, 128))]
            assert len(picture.crop((0, 0, SIZE, 4 * num_rows)).getcolors(SIZE * SIZE)) > 8


def test_model_defaults_and_overrides(omni):
    guided = OmniMamba(omni.bundle, defaults=GenerationDefaults(guidance_scale=4.0, temperature=0.5, top_k=9, top_p=0.9))
    given = {"guidance_scale": 4.0, "temperature": 0.5, "top_k": 9, "top_p": 0.9}
    assert same(guided.generate_image("a zoo", seed=0), omni.generate_image("a zoo", seed=0, **given))
    plain = {"guidance_scale": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    assert same(guided.generate_image("a zoo", seed=0, **plain), omni.generate_image("a zoo", seed=0))
    assert not same(guided.generate_image("a zoo", seed=0), omni.generate_image("a zoo", seed=0))


def test_defaults_file(tmp_path):
    assert GenerationDefaults.read(tmp_path) == GenerationDefaults(1.0, 1.0, 0, 1.0)
    (tmp_path / "generation.json").write_text(GenerationDefaults(guidance_scale=3.0, top_k=100).to_json())
    assert GenerationDefaults.read(tmp_path) == GenerationDefaults(guidance_scale=3.0, top_k=100)
    for content, message in (
        ('{"guidance": 3}', "unknown key 'guidance' in .*generation.json; did you mean 'guidance_scale'"),
        ('{"top_p": 0}', "top_p=0"),
        ("[3]", "expected an object"),
        ("{", "not JSON"),
    ):
        (tmp_path / "generation.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            GenerationDefaults.read(tmp_path)


def test_reconstruction(omni, picture):
    image = omni.reconstruct(picture(0))
    assert image.size == (SIZE, SIZE) and image.mode == "RGB"
    assert not same([image], [omni.reconstruct(picture(1))])


# ---- image to text


def test_answers_do_not_depend_on_the_batch(omni, picture):
    images, questions = [picture(i) for i in range(5)], ["what is this?", "is it a table or an apple?", "why", "hello", "a zoo?"]
    answers = omni.describe(images, questions, max_new_tokens=20)
    assert answers == [omni.describe(image, question, max_new_tokens=20) for image, question in zip(images, questions, strict=True)]
    assert len(set(answers)) == 5
    assert omni.describe(images[:2], max_new_tokens=20) == [omni.describe(image, max_new_tokens=20) for image in images[:2]]
    assert omni.describe([], "what?") == []


def test_several_questions_about_an_image_read_it_once(omni, picture, monkeypatch):
    images, questions = [picture(i) for i in range(4)], [["what is this?", "why"], [], ["hello"], ["a zoo?"] * 8]
    described = [[omni.describe(image, text, max_new_tokens=20) for text in texts] for image, texts in zip(images, questions, strict=True)]
    with_image = []
    embed_prompt = omni.engine.runner.embed_prompt
    monkeypatch.setattr(omni.engine.runner, "embed_prompt", lambda r: (with_image.append(r.features is not None), embed_prompt(r))[1])
    assert omni.answer(omni.encode_image(images), questions, max_new_tokens=20) == described
    assert (len(with_image), sum(with_image)) == (4 + 11, 4)
    with pytest.raises(ValueError, match="1 lists of questions for 2 images"):
        omni.answer(omni.encode_image(images[:2]), [["why"]])


def test_image_sources(omni, picture, tmp_path):
    picture(0).save(tmp_path / "image.png")
    sources = [
        picture(0),
        tmp_path / "image.png",
        str(tmp_path / "image.png"),
        (tmp_path / "image.png").read_bytes(),
        np.asarray(picture(0)),
    ]
    assert len({omni.describe(source, "what?", max_new_tokens=8) for source in sources}) == 1
    assert torch.equal(omni.encode_image(sources[:1]), omni.encode_image(sources[-1:]))


def test_pieces_are_the_answer(omni, picture):
    """Long answers of random bytes: most characters come in several tokens."""
    for seed in range(6):
        sampling = {"max_new_tokens": 50, "temperature": 1.0, "seed": seed}
        pieces = list(omni.describe(picture(0), "what?", stream=True, **sampling))
        assert len(pieces) > 5 and all(pieces)
        assert "".join(pieces) == omni.describe(picture(0), "what?", **sampling)


def test_outer_white_space_is_left_out_of_streams(omni, tokenizer, monkeypatch):
    ids = tokenizer.encode("  \n a zoo \n an apple\n  ")
    forced = iter(ids)
    monkeypatch.setattr("omnimamba.engine.engine.sample", lambda logits, rows: torch.tensor([next(forced)]))
    pieces = list(omni.chat().ask("hello", stream=True, max_new_tokens=len(ids)))
    assert "".join(pieces) == "a zoo \n an apple" and len(pieces) > 2


def test_a_stream_that_is_dropped_unread_leaves_no_work(omni, picture):
    omni.describe(picture(0), max_new_tokens=4, stream=True)
    assert not omni.engine.has_work


def test_an_empty_question_is_not_replaced(omni, picture):
    for question in ("", ["", "what?"]):
        with pytest.raises(ValueError, match="question '' is empty"):
            omni.describe([picture(0), picture(1)], question)


def test_streams_check_their_input_at_once(omni, picture):
    with pytest.raises(ValueError, match="max_new_tokens=1000"):
        omni.describe(picture(0), max_new_tokens=1000, stream=True)
    with pytest.raises(ValueError, match="not a list of 2"):
        omni.describe([picture(0), picture(1)], stream=True)


def test_an_image_is_painted_while_an_answer_streams(omni, picture):
    answer = omni.describe(picture(0), "what?", max_new_tokens=30)
    pieces = omni.describe(picture(0), "what?", max_new_tokens=30, stream=True)
    first = next(pieces)
    assert same(omni.generate_image("a zoo", seed=0), OmniMamba(omni.bundle).generate_image("a zoo", seed=0))
    assert first + "".join(pieces) == answer


# ---- conversations


def counted_prefills(omni, monkeypatch):
    lengths, prefill = [], omni.engine.runner.prefill

    def counting(slots, chunks, task):
        lengths.extend(len(chunk) for chunk in chunks)
        return prefill(slots, chunks, task)

    monkeypatch.setattr(omni.engine.runner, "prefill", counting)
    return lengths


@pytest.mark.parametrize("has_image", [True, False])
def test_a_turn_reads_its_own_text_only(omni, picture, tokenizer, monkeypatch, has_image):
    conversation = omni.chat(picture(0) if has_image else None)
    first = conversation.ask("what is this?", max_new_tokens=10)
    if has_image:
        assert first == omni.describe(picture(0), "what is this?", max_new_tokens=10)
    lengths = counted_prefills(omni, monkeypatch)
    second = conversation.ask("and this?", max_new_tokens=10)
    assert sum(lengths) == len(tokenizer.encode("USER: and this? ASSISTANT:")) + 2 or sum(lengths) < 25
    assert conversation.messages == [("user", "what is this?"), ("assistant", first), ("user", "and this?"), ("assistant", second)]


def test_a_conversation_is_one_prompt(omni, tokenizer):
    """What the state has read after two turns is the layout of the whole conversation."""
    conversation, read = omni.chat(), []
    for question in ("what is this?", "and this?", "why?"):
        before = conversation.state
        conversation.ask(question, max_new_tokens=6)
        read.append((before, conversation.state.position.item()))
    positions = [position for _, position in read]
    assert positions == sorted(positions) and read[0][0] is None
    engine = omni.engine
    request = Request(Task.MMU, omni.first_turns([("user", "what is this?")]), sampling=SamplingParams(0, max_new_tokens=6))
    (sample,) = engine.run([request])[0]
    assert tokenizer.decode(sample.tokens).strip() == conversation.messages[1][1]


def test_the_fingerprint_is_computed_once(omni, tmp_path, monkeypatch):
    """A server reads and writes conversations between two steps of its engine, and the checksum of a large model takes seconds."""
    monkeypatch.delitem(vars(omni), "fingerprint", raising=False)
    computed = []
    monkeypatch.setattr(type(omni.bundle), "fingerprint", property(lambda bundle: computed.append(bundle) or "0123456789abcdef"))
    conversation = omni.chat()
    conversation.ask("hello", max_new_tokens=2)
    for _ in range(2):
        conversation.save(tmp_path / "chat.safetensors")
        conversation = omni.load_conversation(tmp_path / "chat.safetensors")
    assert len(computed) == 1
    del omni.fingerprint


def test_saved_conversations_go_on(omni, picture, tmp_path):
    conversation = omni.chat(picture(0))
    conversation.ask("what is this?", max_new_tokens=10)
    conversation.save(tmp_path / "chat.safetensors")
    loaded = omni.load_conversation(tmp_path / "chat.safetensors")
    assert loaded.messages == conversation.messages
    assert loaded.ask("why?", max_new_tokens=10) == conversation.ask("why?", max_new_tokens=10)
    assert loaded.messages == conversation.messages


def test_only_conversations_are_loaded(omni, tmp_path):
    conversation = omni.chat()
    with pytest.raises(ValueError, match="conversation is empty"):
        conversation.save(tmp_path / "chat.safetensors")
    with pytest.raises(ValueError, match="no such state file"):
        omni.load_conversation(tmp_path / "chat.safetensors")
    conversation.ask("hello", max_new_tokens=2)
    conversation.state.save(tmp_path / "state.safetensors", fingerprint=omni.bundle.fingerprint)
    with pytest.raises(ValueError, match="no conversation"):
        omni.load_conversation(tmp_path / "state.safetensors")


def test_a_closed_stream_leaves_the_conversation_as_it_was(omni):
    expected = omni.chat()
    expected.ask("hello", max_new_tokens=8)
    conversation = omni.chat()
    conversation.ask("hello", max_new_tokens=8)
    pieces = conversation.ask("what is this?", max_new_tokens=20, stream=True)
    next(pieces)
    pieces.close()
    assert not omni.engine.has_work and len(conversation.messages) == 2
    assert conversation.ask("why?", max_new_tokens=8) == expected.ask("why?", max_new_tokens=8)
    assert conversation.messages == expected.messages


def test_a_conversation_ends_with_the_position_table(omni):
    conversation = omni.chat()
    conversation.ask("what is this?", max_new_tokens=30)
    with pytest.raises(ValueError, match="positions left"):
        conversation.ask("what is this?", max_new_tokens=30)
    assert len(conversation.messages) == 2
    conversation.ask("what is this?", max_new_tokens=30, past_last_position="clamp")
    assert len(conversation.messages) == 4


# ---- parts and places


def test_missing_parts(omni, picture, config):
    bare = OmniMamba.from_config(config)
    with pytest.raises(ValueError, match="no tokenizer.json"):
        bare.generate_image("a zoo")
    bare.bundle.vq = bare.bundle.vision = None
    for call in (lambda: bare.paint([[0] * 64]), lambda: bare.reconstruct(picture(0))):
        with pytest.raises(ValueError, match="without its VQ tokenizer.*omnimamba convert"):
            call()
    with pytest.raises(ValueError, match="without its vision towers.*omnimamba convert"):
        bare.encode_image([picture(0)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ""}, "empty"),
        ({"prompt": ["a zoo", " "]}, "empty"),
        ({"prompt": "apple " * 50}, "the limit is 12"),
        ({"num_images": 0}, "num_images=0"),
        ({"temperature": -1}, "temperature=-1"),
        ({"top_p": 0}, "top_p=0"),
        ({"seed": -1}, "seed=-1"),
        ({"guidance_scale": -1}, "guidance_scale=-1"),
    ],
)
def test_impossible_images(omni, options, message):
    with pytest.raises(ValueError, match=message) as error:
        omni.generate_image(**{"prompt": "a zoo", **options})
    assert "\n" not in str(error.value) and not omni.engine.has_work


def test_questions_match_images(omni, picture):
    with pytest.raises(ValueError, match="3 questions for 2 images"):
        omni.describe([picture(0), picture(1)], ["what?"] * 3)
    with pytest.raises(ValueError):
        omni.describe(picture(0), "  ")


def test_random_weights_follow_the_seed(config):
    first, again, other = (OmniMamba.from_config(config, seed=seed).bundle for seed in (0, 0, 1))
    for part in ("model", "vision", "vq"):
        weights = [torch.cat([p.flatten() for p in getattr(bundle, part).parameters()]) for bundle in (first, again, other)]
        assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
        assert not getattr(first, part).training


def test_random_weights_leave_the_global_generator_alone(config):
    before = torch.get_rng_state()
    OmniMamba.from_config(config, seed=4)
    assert torch.equal(before, torch.get_rng_state())


def test_bfloat16(config, tokenizer_file, picture):
    omni = OmniMamba.from_config(config, tokenizer_file=tokenizer_file, dtype="bfloat16")
    assert omni.bundle.model.dtype is torch.bfloat16
    assert omni.generate_image("a zoo", guidance_scale=2.0, seed=0)[0].size == (SIZE, SIZE)
    assert isinstance(omni.describe(picture(0), max_new_tokens=4), str)


def test_devices_and_dtypes():
    assert resolve_device("auto").type in ("cuda", "mps", "cpu")
    assert resolve_dtype("auto", torch.device("cpu")) is torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) is torch.bfloat16
    assert resolve_dtype(torch.float16, torch.device("cpu")) is torch.float16
    for device in ("gpu", "cuda:99", "meta"):
        with pytest.raises(ValueError, match="this computer"):
            resolve_device(device)
    for dtype in ("int8", torch.int64):
        with pytest.raises(ValueError, match="unknown dtype"):
            resolve_dtype(dtype, torch.device("cpu"))
