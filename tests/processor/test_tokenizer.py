"""Control ids are out of reach of text, and streamed pieces add up to the whole text."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from omnimamba.config import EOS_TOKEN, SPECIAL_TOKENS, OmniMambaConfig
from omnimamba.processor.tokenizer import TextTokenizer

TEXTS = ("A red bus.", " starts with a space", "😀👩‍👩‍👧 naïve 日本語", "four    spaces", "line\nline\n", "\x00", "")


def test_special_ids_are_the_recorded_ones(tok: TextTokenizer, prompts: dict[str, Any]) -> None:
    ids = prompts["special_ids"]
    assert tok.eos_id == prompts["eos_id"]
    assert tok.pad_id == prompts["pad_id"] == ids["<|pad|>"]
    for name in ("soi", "eoi", "sot", "eot", "t2i", "mmu"):
        assert getattr(tok, f"{name}_id") == ids[f"<|{name}|>"]
    in_order = {token: tok.config.base_vocab_size + i for i, token in enumerate(SPECIAL_TOKENS)}
    assert in_order == {"[PAD]" if token == "<|pad|>" else token: token_id for token, token_id in ids.items()}
    assert prompts["tokenizer_length"] == tok.config.base_vocab_size + len(SPECIAL_TOKENS)


@pytest.mark.parametrize("text", [EOS_TOKEN, "<|padding|>", *SPECIAL_TOKENS, f"Stop{EOS_TOKEN}<|eot|>[PAD] now"])
def test_spelled_out_special_tokens_are_plain_text(tok: TextTokenizer, text: str) -> None:
    ids = tok.encode(text)
    assert max(ids) < tok.config.base_vocab_size
    assert not (tok.stop_ids | set(tok.suppressed_ids)) & set(ids)
    assert tok.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_encode_and_decode(tok: TextTokenizer, text: str) -> None:
    assert tok.decode(tok.encode(text)) == text


def test_runs_of_spaces_keep_their_own_ids(tok: TextTokenizer, golden: Path) -> None:
    added = json.loads((golden / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    runs = {token["content"]: token["id"] for token in added if not token["special"]}
    assert runs
    for run, token_id in runs.items():
        assert tok.encode(f"a{run}b")[1] == token_id


def test_lone_surrogate_is_a_value_error(tok: TextTokenizer) -> None:
    with pytest.raises(ValueError, match="lone surrogate .* at character 2"):
        tok.encode("ab\ud800")


def test_decode_leaves_out_what_is_no_text(tok: TextTokenizer) -> None:
    written = tok.encode("A red bus.")
    unwritten = [tok.eos_id, *range(tok.config.base_vocab_size, tok.config.text_vocab_size)]
    assert tok.decode([*unwritten, *written, *unwritten]) == "A red bus."


def test_every_id_is_text_or_stop_or_suppressed(tok: TextTokenizer) -> None:
    assert tok.stop_ids == {tok.eos_id, tok.eot_id}
    assert list(tok.suppressed_ids) == sorted(set(tok.suppressed_ids))
    assert not tok.stop_ids & set(tok.suppressed_ids)
    text_ids = set(range(tok.config.text_vocab_size)) - tok.stop_ids - set(tok.suppressed_ids)
    assert text_ids == {token_id for token_id in range(tok.config.text_vocab_size) if tok.decode([token_id])}


def test_special_tokens_of_the_base_tokenizer_are_suppressed(tok: TextTokenizer, golden: Path) -> None:
    added = json.loads((golden / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    special = {token["id"] for token in added if token["special"]} - tok.stop_ids
    assert special and special <= set(tok.suppressed_ids)
    assert tok.decode(special) == ""


def stream_pieces(tok: TextTokenizer, ids: list[int]) -> list[str]:
    stream = tok.stream()
    return [*(stream.push(token_id) for token_id in ids), stream.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_never_shows_half_a_character(tok: TextTokenizer, text: str) -> None:
    ids = tok.encode(text)
    pieces = stream_pieces(tok, ids)
    assert "".join(pieces) == text
    assert pieces[-1] == ""
    assert not any("\ufffd" in piece for piece in pieces)


def test_piece_is_empty_inside_a_character(tok: TextTokenizer) -> None:
    ids = tok.encode("😀")
    assert len(ids) > 1, "this test needs a character of several tokens"
    assert stream_pieces(tok, ids) == [""] * (len(ids) - 1) + ["😀", ""]


def test_flush_shows_a_cut_character_and_starts_over(tok: TextTokenizer) -> None:
    stream = tok.stream()
    ids = tok.encode("😀")
    assert stream.push(ids[0]) == ""
    assert stream.flush() == tok.decode(ids[:1]) != ""
    assert "".join(stream.push(token_id) for token_id in ids) == "😀"
    assert stream.flush() == ""
    assert "".join(stream.push(token_id) for token_id in tok.encode("red")) == "red"
    assert stream.push(ids[0]) == ""
    assert stream.flush() == tok.decode(ids[:1])


@settings(deadline=None)
@given(data=st.data())
def test_streamed_pieces_add_up_to_decode(tok: TextTokenizer, data: st.DataObject) -> None:
    # the low ids are single bytes: invalid and cut UTF-8 in every combination
    token_id = st.one_of(st.integers(0, 260), st.integers(0, tok.config.text_vocab_size - 1))
    ids = data.draw(st.lists(token_id, max_size=24))
    assert "".join(stream_pieces(tok, ids)) == tok.decode(ids)


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_streamed_pieces_of_any_text_are_whole(tok: TextTokenizer, text: str) -> None:
    ids = tok.encode(text)
    pieces = stream_pieces(tok, ids)
    assert "".join(pieces) == tok.decode(ids)
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_wrong_vocabulary_size_names_both(golden: Path, config: OmniMambaConfig) -> None:
    other = dataclasses.replace(config, base_vocab_size=config.base_vocab_size - 1)
    with pytest.raises(ValueError, match=rf"tokenizer\.json.*{config.base_vocab_size} ids.*base_vocab_size is {other.base_vocab_size}"):
        TextTokenizer.from_file(golden / "tokenizer.json", other)


def test_gap_in_the_ids_is_an_error(golden: Path, config: OmniMambaConfig) -> None:
    content = json.loads((golden / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    token = next(token for token in vocab if len(token) == 1)
    vocab[token] = config.base_vocab_size  # where [PAD] belongs
    with pytest.raises(ValueError, match=f"up to {config.base_vocab_size}"):
        TextTokenizer(Tokenizer.from_str(json.dumps(content)), config)


def test_wrong_eos_id_names_both(golden: Path, config: OmniMambaConfig) -> None:
    with pytest.raises(ValueError, match=f"id {config.eos_id} in the tokenizer.*eos_id=7"):
        TextTokenizer.from_file(golden / "tokenizer.json", dataclasses.replace(config, eos_id=7))


def test_eos_that_text_can_spell_is_an_error(golden: Path, config: OmniMambaConfig) -> None:
    content = json.loads((golden / "tokenizer.json").read_text(encoding="utf-8"))
    content["added_tokens"][config.eos_id]["special"] = False
    with pytest.raises(ValueError, match="not marked special"):
        TextTokenizer(Tokenizer.from_str(json.dumps(content)), config)


def test_padding_and_truncation_of_the_file_are_switched_off(golden: Path, config: OmniMambaConfig) -> None:
    tokenizer = Tokenizer.from_file(str(golden / "tokenizer.json"))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)
    tok = TextTokenizer(tokenizer, config)
    assert tok.decode(tok.encode("A red bus.")) == "A red bus."


@pytest.mark.parametrize("content", [b"", b"not json", b"{}", b"\xff\xfe"])
def test_file_that_is_no_tokenizer_is_one_line(tmp_path: Path, config: OmniMambaConfig, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer\.json: .") as raised:
        TextTokenizer.from_file(path, config)
    assert "\n" not in str(raised.value)


def test_missing_file_is_named(tmp_path: Path, config: OmniMambaConfig) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        TextTokenizer.from_file(tmp_path / "absent.json", config)
