"""The layout of every prompt and training sample; no other file knows one.

Text to image, `n` = max_caption_tokens, `k` = image tokens (68 and 256 in the released model):

    ids     [t2i] [sot]  caption, left-padded with [PAD] to n  [eot] [soi]  k image ids  [eoi]
    labels  -100 for the n + 4 ids of the prompt                            k image ids  -100

Understanding, text in one of the two styles of `PromptStyle`:

    ids     [mmu] [soi]  vision features  [eoi] [sot]  text
    labels  -100 up to and with [sot]                  the answers and their eos, else -100

Labels stand at their own token's place; the loss compares logits[:, :-1] with labels[:, 1:]. Layouts are those of the
authors' published data sets and scripts (hustvl/OmniMamba b372978): util/coco_dataset.py, util/llava_instruct_data.py,
util/conversation.py, mamba_prompter.py. Turns are tokenised one by one and joined as ids, as their data set does, so
the ids of a conversation are a prefix of the ids of its continuation.
"""

from collections.abc import Sequence

from omnimamba.config import EOS_TOKEN, IGNORE_INDEX, OmniMambaConfig, PromptStyle
from omnimamba.processor.tokenizer import TextTokenizer

IMAGE_MARKER = "<image>"
"""Stands for the image in LLaVA conversations. The vision features have a fixed place, so it is removed."""

ROLES = ("user", "assistant")


def t2i_prompt(tok: TextTokenizer, caption: str, *, truncate: bool = False) -> list[int]:
    """Ids in front of the image tokens, always max_caption_tokens + 4.

    A caption with too many tokens is a ValueError unless `truncate` keeps its first ones, as the authors do in training.
    """
    limit = tok.config.max_caption_tokens
    ids = tok.encode(caption) if caption.strip() else []
    if not ids:
        raise ValueError(f"caption {caption!r} is empty; describe the image in at least one word")
    if len(ids) > limit and not truncate:
        raise ValueError(f"caption has {len(ids)} tokens, the limit is {limit}; shorten it by {len(ids) - limit}")
    return _t2i_layout(tok, ids[:limit])


def t2i_null_prompt(tok: TextTokenizer) -> list[int]:
    """The prompt without a caption: the unconditional half of classifier-free guidance, and caption dropout in training."""
    return _t2i_layout(tok, [])


def t2i_training_ids(tok: TextTokenizer, caption: str | None) -> list[int]:
    """The prompt and the [eoi] that ends the image: max_caption_tokens + 5 ids. A caption of None is a dropped one."""
    prompt = t2i_null_prompt(tok) if caption is None else t2i_prompt(tok, caption, truncate=True)
    return [*prompt, tok.eoi_id]


def t2i_labels(image_ids: Sequence[int], config: OmniMambaConfig) -> list[int]:
    """Labels of prompt, image and [eoi]: only image tokens count."""
    if len(image_ids) != config.num_image_tokens:
        raise ValueError(f"{len(image_ids)} image ids, but the model paints {config.num_image_tokens}; tokenise with its own VQ tokenizer")
    return [IGNORE_INDEX] * config.t2i_prompt_length + list(image_ids) + [IGNORE_INDEX]


def _t2i_layout(tok: TextTokenizer, caption_ids: list[int]) -> list[int]:
    padding = [tok.pad_id] * (tok.config.max_caption_tokens - len(caption_ids))
    return [tok.t2i_id, tok.sot_id, *padding, *caption_ids, tok.eot_id, tok.soi_id]


def mmu_before_image(tok: TextTokenizer) -> list[int]:
    """Ids in front of the vision features: [mmu][soi]."""
    return [tok.mmu_id, tok.soi_id]


def mmu_after_image(tok: TextTokenizer) -> list[int]:
    """Ids between the vision features and the text: [eoi][sot]."""
    return [tok.eoi_id, tok.sot_id]


def chat_prompt(messages: Sequence[tuple[str, str]], style: PromptStyle) -> str:
    """The text of a conversation up to where the next answer starts, for people to read; the model gets `chat_ids`.

    messages: ("user" | "assistant", text) in turn, from a user message to a user message.
    """
    _check_conversation(messages)
    text = ""
    for turn_idx, (role, message) in enumerate(messages):
        if role == "user":
            text += _question_text(message, style, is_first=turn_idx == 0)
        else:
            text += _answer_text(message, style) + EOS_TOKEN
    return text


def chat_ids(tok: TextTokenizer, messages: Sequence[tuple[str, str]], style: PromptStyle | None = None) -> list[int]:
    """Text ids after the image, up to where the next answer starts: `chat_prompt` with eos as an id. Style from the config.

    chat_ids(past + answer + question) == chat_ids(past) + answer_ids(answer) + next_turn_ids(question).
    """
    _check_conversation(messages)
    ids: list[int] = []
    for turn_idx, (role, message) in enumerate(messages):
        if role == "assistant":
            ids += answer_ids(tok, message, style)
        elif turn_idx == 0:
            ids += tok.encode(_question_text(message, _style(tok, style), is_first=True))
        else:
            ids += next_turn_ids(tok, message, style)
    return ids


def answer_ids(tok: TextTokenizer, answer: str, style: PromptStyle | None = None) -> list[int]:
    """Ids of one answer with its eos, as a state holds them after generating it."""
    return [*tok.encode(_answer_text(answer, _style(tok, style))), tok.eos_id]


def next_turn_ids(tok: TextTokenizer, question: str, style: PromptStyle | None = None) -> list[int]:
    """Ids to append for a further question when the state already holds the conversation up to the last answer's eos."""
    _check_question(question)
    return tok.encode(_question_text(question, _style(tok, style), is_first=False))


def conversation_sample(tok: TextTokenizer, turns: Sequence[tuple[str, str]], max_length: int) -> tuple[list[int], list[int]]:
    """(input_ids, labels) of a training conversation in the IN_OUT style, at most `max_length` long, [eot] at the end.

    turns: ("user" | "assistant", text) in turn, the user first. A turn that does not fit is left out together with all
    later ones, as in the authors' data set. ValueError if no answer is left: such a sample has no target (their defect 20).
    """
    _check_turns(turns)
    input_ids: list[int] = []
    labels: list[int] = []
    for turn_idx, (role, message) in enumerate(turns):
        if role == "user":
            turn_ids = tok.encode(_question_text(message, PromptStyle.IN_OUT, is_first=turn_idx == 0))
            turn_labels = [IGNORE_INDEX] * len(turn_ids)
        else:
            turn_ids = turn_labels = answer_ids(tok, message, PromptStyle.IN_OUT)
        if len(input_ids) + len(turn_ids) + 1 > max_length:
            break
        input_ids += turn_ids
        labels += turn_labels
    if all(label == IGNORE_INDEX for label in labels):
        raise ValueError(f"no answer of the {len(turns)} turns fits in max_length={max_length} tokens; raise it or drop the sample")
    return [*input_ids, tok.eot_id], [*labels, IGNORE_INDEX]


def caption_sample(tok: TextTokenizer, caption: str, max_length: int) -> tuple[list[int], list[int]]:
    """(input_ids, labels) of a caption that directly follows the image: every id is a target, the last one is eos.

    A caption that is too long loses its end but keeps the eos (the authors lose it: their defect 21).
    """
    ids = tok.encode(caption.strip())
    if not ids:
        raise ValueError(f"caption {caption!r} is empty; drop the sample")
    if max_length < 2:
        raise ValueError(f"max_length={max_length} has no room for a caption and its eos; pass at least 2")
    input_ids = [*ids[: max_length - 1], tok.eos_id]
    return input_ids, list(input_ids)


def _question_text(question: str, style: PromptStyle, *, is_first: bool) -> str:
    question = _clean(question)
    if PromptStyle(style) is PromptStyle.IN_OUT:
        lead = "" if is_first else "\n"
        return f"{lead}In: {question}\nOut: "
    return f"USER: {question} ASSISTANT:"


def _answer_text(answer: str, style: PromptStyle) -> str:
    answer = answer.strip()
    if PromptStyle(style) is PromptStyle.IN_OUT:
        return answer or " "  # an empty answer is one space in the authors' prompt builder
    return f" {answer}"


def _clean(question: str) -> str:
    return question.replace(IMAGE_MARKER, "").strip()


def _style(tok: TextTokenizer, style: PromptStyle | None) -> PromptStyle:
    return tok.config.prompt_style if style is None else style


def _check_turns(turns: Sequence[tuple[str, str]]) -> None:
    for turn_idx, (role, _) in enumerate(turns):
        if role != ROLES[turn_idx % 2]:
            raise ValueError(f"message {turn_idx + 1} has role {role!r}; messages alternate user, assistant, user, ...")


def _check_conversation(messages: Sequence[tuple[str, str]]) -> None:
    _check_turns(messages)
    if len(messages) % 2 == 0:
        raise ValueError(f"a conversation of {len(messages)} messages has no question to answer; end it with a user message")
    for role, message in messages:
        if role == "user":
            _check_question(message)


def _check_question(question: str) -> None:
    if not _clean(question):
        raise ValueError(f"question {question!r} is empty; ask something about the image")
