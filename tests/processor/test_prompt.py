"""Every layout of golden/prompts.json, id for id, and what holds for every conversation."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from omnimamba.config import EOS_TOKEN, PromptStyle
from omnimamba.processor.prompt import (
    IGNORE_INDEX,
    answer_ids,
    caption_sample,
    chat_ids,
    chat_prompt,
    conversation_sample,
    mmu_after_image,
    mmu_before_image,
    next_turn_ids,
    t2i_labels,
    t2i_null_prompt,
    t2i_prompt,
    t2i_training_ids,
)
from omnimamba.processor.tokenizer import TextTokenizer

ROLE = {"human": "user", "gpt": "assistant"}


def messages_of(turns: list[list[str]]) -> list[tuple[str, str]]:
    """LLaVA's role names to ours."""
    return [(ROLE[role], text) for role, text in turns]


def pad_to(max_length: int, ids: list[int], filler: int) -> list[int]:
    assert len(ids) <= max_length
    return ids + [filler] * (max_length - len(ids))


def ids_split_at_eos(tok: TextTokenizer, text: str) -> list[int]:
    """What a tokenizer gives that reads `<|endoftext|>` in the text as the control id."""
    pieces = [tok.encode(piece) for piece in text.split(EOS_TOKEN)]
    return list(itertools.chain(pieces[0], *([tok.eos_id, *piece] for piece in pieces[1:])))


# Text to image


def test_t2i_prompts_are_the_recorded_ones(tok: TextTokenizer, prompts: dict[str, Any]) -> None:
    limit = tok.config.max_caption_tokens
    for case in prompts["t2i"]:
        assert tok.encode(case["prompt"]) == case["text_ids"]
        assert t2i_prompt(tok, case["prompt"], truncate=len(case["text_ids"]) > limit) == case["infer_ids_72"]
        if "train_ids_73" in case:
            assert t2i_training_ids(tok, case["prompt"]) == case["train_ids_73"]
    assert any(len(case["text_ids"]) > limit for case in prompts["t2i"])


def test_t2i_labels_are_the_recorded_ones(tok: TextTokenizer, golden: Path) -> None:
    case = load_file(golden / "t2i_forward.safetensors")
    for image_ids, targets in zip(case["image_ids"].tolist(), case["shifted_targets"].tolist(), strict=True):
        labels = t2i_labels(image_ids, tok.config)
        assert labels[1:] == targets
        assert len(labels) == tok.config.t2i_positions


def test_t2i_labels_of_another_grid_are_an_error(tok: TextTokenizer) -> None:
    with pytest.raises(ValueError, match=f"3 image ids.*{tok.config.num_image_tokens}"):
        t2i_labels([1, 2, 3], tok.config)


def test_null_prompt_is_a_prompt_of_pads(tok: TextTokenizer) -> None:
    null = t2i_null_prompt(tok)
    assert null == [tok.t2i_id, tok.sot_id, *[tok.pad_id] * tok.config.max_caption_tokens, tok.eot_id, tok.soi_id]
    assert t2i_training_ids(tok, None) == [*null, tok.eoi_id]


def test_caption_may_fill_the_limit_and_no_more(tok: TextTokenizer) -> None:
    limit = tok.config.max_caption_tokens
    fits, too_long = "a" * limit, "a" * (limit + 1)
    assert len(tok.encode(too_long)) == limit + 1, "this test needs a text of one token a letter"
    assert tok.pad_id not in t2i_prompt(tok, fits)
    with pytest.raises(ValueError, match=f"{limit + 1} tokens, the limit is {limit}"):
        t2i_prompt(tok, too_long)
    assert t2i_prompt(tok, too_long, truncate=True) == t2i_prompt(tok, fits)


@pytest.mark.parametrize("caption", ["", "  ", "\n\t"])
def test_empty_caption_is_an_error(tok: TextTokenizer, caption: str) -> None:
    for truncate in (False, True):
        with pytest.raises(ValueError, match="is empty"):
            t2i_prompt(tok, caption, truncate=truncate)
    with pytest.raises(ValueError, match="is empty"):
        caption_sample(tok, caption, 16)


@settings(deadline=None)
@given(caption=st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip))
def test_t2i_prompt_has_one_length_and_no_control_id_inside(tok: TextTokenizer, caption: str) -> None:
    ids = t2i_prompt(tok, caption, truncate=True)
    assert len(ids) == tok.config.t2i_prompt_length
    written = [token_id for token_id in ids[2:-2] if token_id != tok.pad_id]
    assert ids[2:-2] == [tok.pad_id] * (tok.config.max_caption_tokens - len(written)) + written
    assert written == tok.encode(caption)[: tok.config.max_caption_tokens]


# Understanding


def test_question_prompts_are_the_recorded_ones(tok: TextTokenizer, prompts: dict[str, Any]) -> None:
    for case in prompts["mmu_infer"]:
        messages = [("user", case["question"])]
        assert chat_prompt(messages, PromptStyle.USER_ASSISTANT) == case["prompt_text"]
        ids = chat_ids(tok, messages, PromptStyle.USER_ASSISTANT)
        assert ids == case["text_ids"]
        assert mmu_before_image(tok) + mmu_after_image(tok) + ids == case["ids_without_image"]


def test_conversation_prompts_are_the_recorded_ones(tok: TextTokenizer, prompts: dict[str, Any]) -> None:
    for case in prompts["inference_conversation_phi1.5"]:
        assert case["messages"][-1] is None, "the answer to be generated"
        messages = list(zip(itertools.cycle(["user", "assistant"]), case["messages"][:-1], strict=False))
        prompt = case["prompt"].strip()
        assert chat_prompt(messages, PromptStyle.USER_ASSISTANT) == prompt
        assert chat_ids(tok, messages, PromptStyle.USER_ASSISTANT) == ids_split_at_eos(tok, prompt)


def test_training_prompts_are_the_recorded_ones(tok: TextTokenizer, prompts: dict[str, Any]) -> None:
    for case in prompts["prompt_builder"]:
        messages = messages_of(case["turns"])
        for num_turns in range(1, len(messages), 2):
            built = "".join(case["pieces"][:num_turns])
            assert chat_prompt(messages[:num_turns], PromptStyle.IN_OUT) == built
            pieces = [ids_split_at_eos(tok, piece) for piece in case["pieces"][:num_turns]]
            assert chat_ids(tok, messages[:num_turns], PromptStyle.IN_OUT) == list(itertools.chain(*pieces))
        # what the authors' builder says of a further question, plus the newline it forgets (their defect 17)
        expected = case["prompt"] + "\nIn: And now?\nOut: "
        assert chat_prompt([*messages, ("user", "And now?")], PromptStyle.IN_OUT) == expected
        assert case["potential_prompt_for_next_question"] == expected.replace(f"{EOS_TOKEN}\nIn: And now?", f"{EOS_TOKEN}In: And now?")


def test_conversation_samples_are_the_recorded_ones(tok: TextTokenizer, prompts: dict[str, Any]) -> None:
    max_length = prompts["mmu_finetune"]["max_length"]
    for case in prompts["mmu_finetune"]["samples"]:
        ids, labels = conversation_sample(tok, messages_of(case["conversation"]), max_length)
        assert pad_to(max_length, ids, tok.pad_id) == case["input_ids"]
        assert pad_to(max_length, labels, IGNORE_INDEX) == case["labels"]


def test_chat_in_training_words_starts_as_the_training_sample(tok: TextTokenizer, prompts: dict[str, Any]) -> None:
    for case in prompts["mmu_finetune"]["samples"]:
        messages = messages_of(case["conversation"])
        for num_turns in range(1, len(messages), 2):
            kept, _ = conversation_sample(tok, messages[: num_turns + 1], 1000)
            ids = chat_ids(tok, messages[:num_turns], PromptStyle.IN_OUT)
            assert kept == [*ids, *answer_ids(tok, messages[num_turns][1], PromptStyle.IN_OUT), tok.eot_id]


def test_caption_samples_are_the_recorded_ones(tok: TextTokenizer, prompts: dict[str, Any]) -> None:
    case = prompts["mmu_align"]
    caption = next(turn["value"] for turn in case["conversation"] if turn["from"] == "gpt")
    ids, labels = caption_sample(tok, caption, case["max_length"])
    assert pad_to(case["max_length"], ids, tok.pad_id) == case["input_ids"]
    assert pad_to(case["max_length"], labels, IGNORE_INDEX) == case["labels"]


def test_long_caption_keeps_its_stop_token(tok: TextTokenizer) -> None:
    caption = "A plate of pasta with tomatoes and basil."
    whole, _ = caption_sample(tok, caption, 100)
    for max_length in range(2, len(whole) + 2):
        ids, labels = caption_sample(tok, caption, max_length)
        assert ids == labels == [*whole[:-1][: max_length - 1], tok.eos_id]
    with pytest.raises(ValueError, match="max_length=1 "):
        caption_sample(tok, caption, 1)


def test_style_comes_from_the_config(tok: TextTokenizer) -> None:
    messages = [("user", "What is this?")]
    assert chat_ids(tok, messages) == chat_ids(tok, messages, tok.config.prompt_style)
    assert next_turn_ids(tok, "And this?") == next_turn_ids(tok, "And this?", tok.config.prompt_style)
    assert len({tuple(chat_ids(tok, messages, style)) for style in PromptStyle}) == 2


@pytest.mark.parametrize("style", PromptStyle)
def test_user_text_cannot_end_a_turn(tok: TextTokenizer, style: PromptStyle) -> None:
    messages = [("user", f"Hi{EOS_TOKEN}<|eot|>[PAD]"), ("assistant", f"No {EOS_TOKEN} here"), ("user", EOS_TOKEN)]
    ids = chat_ids(tok, messages, style)
    assert ids.count(tok.eos_id) == 1  # after the answer
    assert max(ids) < tok.config.base_vocab_size


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
questions = texts.filter(lambda text: text.replace("<image>", "").strip())
answers = texts.filter(lambda text: text == text.strip())


@settings(deadline=None)
@given(past=st.lists(st.tuples(questions, texts), max_size=2), question=questions, answer=answers, follow_up=questions)
@example(past=[], question="Which tag?", answer="<image>", follow_up="Why?")
@pytest.mark.parametrize("style", PromptStyle)
def test_state_may_grow_by_answer_eos_and_next_turn(
    tok: TextTokenizer, style: PromptStyle, past: list[tuple[str, str]], question: str, answer: str, follow_up: str
) -> None:
    prefix = [message for q, a in past for message in (("user", q), ("assistant", a))] + [("user", question)]
    whole = [*prefix, ("assistant", answer), ("user", follow_up)]
    generated = tok.encode(answer if style is PromptStyle.IN_OUT else f" {answer}")
    assert chat_ids(tok, whole, style) == chat_ids(tok, prefix, style) + generated + [tok.eos_id] + next_turn_ids(tok, follow_up, style)
    assert answer_ids(tok, answer, style) == [*generated, tok.eos_id]


@settings(deadline=None)
@given(
    turns=st.lists(st.tuples(texts, texts), min_size=1, max_size=4).map(
        lambda pairs: [message for q, a in pairs for message in (("user", q), ("assistant", a))]
    ),
    max_length=st.integers(1, 120),
)
def test_conversation_sample_keeps_whole_turns(tok: TextTokenizer, turns: list[tuple[str, str]], max_length: int) -> None:
    whole_ids, whole_labels = conversation_sample(tok, turns, 10_000)
    try:
        ids, labels = conversation_sample(tok, turns, max_length)
    except ValueError:
        first_ids, _ = conversation_sample(tok, turns[:2], 10_000)
        assert len(first_ids) > max_length
        return
    assert len(ids) == len(labels) <= max_length
    assert ids[-1] == tok.eot_id and labels[-1] == IGNORE_INDEX
    assert ids[:-1] == whole_ids[: len(ids) - 1] and labels[:-1] == whole_labels[: len(ids) - 1]
    targets = [label for label in labels if label != IGNORE_INDEX]
    assert targets and targets[-1] == tok.eos_id
    assert all(label in (token_id, IGNORE_INDEX) for token_id, label in zip(ids, labels, strict=True))


def test_sample_without_a_target_is_an_error(tok: TextTokenizer) -> None:
    turns = [("user", "What is this?"), ("assistant", "A cat.")]
    ids, _ = conversation_sample(tok, turns, 1000)
    assert conversation_sample(tok, turns, len(ids))[0] == ids
    with pytest.raises(ValueError, match=f"no answer of the 2 turns fits in max_length={len(ids) - 1}"):
        conversation_sample(tok, turns, len(ids) - 1)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "0 messages has no question"),
        ([("user", "Hi"), ("assistant", "Hello")], "2 messages has no question"),
        ([("assistant", "Hello")], "message 1 has role 'assistant'"),
        ([("user", "Hi"), ("user", "Hi")], "message 2 has role 'user'"),
        ([("system", "Be kind.")], "message 1 has role 'system'"),
        ([("user", " ")], "question ' ' is empty"),
        ([("user", "<image>\n")], "is empty"),
    ],
)
def test_conversation_without_a_question_is_an_error(tok: TextTokenizer, messages: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chat_ids(tok, messages)
    with pytest.raises(ValueError, match=message):
        chat_prompt(messages, PromptStyle.IN_OUT)


def test_empty_next_question_is_an_error(tok: TextTokenizer) -> None:
    with pytest.raises(ValueError, match="is empty"):
        next_turn_ids(tok, " <image> ")
