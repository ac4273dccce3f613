"""Chat through the `openai` client: the answers are those of the offline API."""

import json

import openai
import pytest

from omnimamba.config import Task
from omnimamba.engine.request import Request, SamplingParams
from omnimamba.processor.image import load_image
from omnimamba.server import service

from .conftest import MODEL, about, data_url, drawing


def ask(client, messages, **options):
    messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    return client.chat.completions.create(model=MODEL, messages=messages, **options)


def test_an_answer_about_an_image_is_that_of_describe(client, omni):
    response = ask(client, [about(data_url(drawing()), "What is this?")], max_tokens=20)
    (choice,) = response.choices
    assert choice.message.content == omni.describe(drawing(), "What is this?", max_new_tokens=20)
    assert choice.message.content and choice.message.role == "assistant"
    assert response.object == "chat.completion" and response.model == MODEL
    request = Request(
        Task.MMU,
        omni.first_turns([("user", "What is this?")]),
        omni.encode_image([drawing()])[0],
        sampling=SamplingParams(0, max_new_tokens=20),
    )
    (sample,) = omni.engine.run([request])[0]
    assert choice.finish_reason == sample.finish_reason and response.usage.completion_tokens == len(sample.tokens)
    assert response.usage.prompt_tokens == len(request.ids) + omni.config.num_vision_tokens


def test_the_default_is_greedy_and_as_long_as_the_table(client, omni):
    (choice,) = ask(client, "Hello").choices
    conversation = omni.chat()
    room = omni.config.mmu_positions - omni.config.num_vision_tokens - len(omni.first_turns([("user", "Hello")])) + 1
    assert choice.message.content == conversation.ask("Hello", max_new_tokens=room)


def test_several_turns_are_read_as_one_prompt(client, omni):
    messages = []
    for question in ("What is this?", "And that?", "Why?"):
        messages.append({"role": "user", "content": question} if messages else about(data_url(drawing()), question))
        answer = ask(client, messages, max_tokens=12).choices[0].message.content
        turns = [(m["role"], m["content"] if isinstance(m["content"], str) else m["content"][1]["text"]) for m in messages]
        features = omni.encode_image([drawing()])[0]
        (sample,) = omni.engine.run([Request(Task.MMU, omni.first_turns(turns), features, sampling=SamplingParams(0, max_new_tokens=12))])[
            0
        ]
        assert answer == omni.tokenizer.decode(sample.tokens).strip()
        messages.append({"role": "assistant", "content": answer})


def test_the_next_turn_goes_on_from_the_last(client, omni):
    """Where the ids of the answer are those of its text, which a model of random weights does not often say."""
    tok = omni.tokenizer
    for i in range(100):
        question = f"Question {i}"
        answer = ask(client, question, max_tokens=2).choices[0].message.content
        if len(tok.encode(answer)) == 2:
            break
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}, {"role": "user", "content": "Why?"}]
    response = ask(client, messages, max_tokens=4)
    expected = omni.config.num_vision_tokens + len(omni.first_turns([("user", question)])) + 1
    assert response.usage.prompt_tokens_details.cached_tokens == expected
    conversation = omni.chat()
    conversation.ask(question, max_new_tokens=2)
    assert response.choices[0].message.content == conversation.ask("Why?", max_new_tokens=4)


def test_a_second_question_does_not_read_the_image_again(client, omni):
    image = data_url(drawing(seed=1))
    first, second = (ask(client, [about(image, text)], max_tokens=4) for text in ("What is this?", "Is it red?"))
    cached = [response.usage.prompt_tokens_details.cached_tokens for response in (first, second)]
    assert cached == [0, omni.config.num_vision_tokens + 4]
    assert second.choices[0].message.content == omni.describe(drawing(seed=1), "Is it red?", max_new_tokens=4)


def test_an_image_with_a_snapshot_is_not_decoded_again(new_omni, serve, omni, monkeypatch):
    """Unless that snapshot goes before its turn comes."""
    calls = []
    monkeypatch.setattr(service, "load_image", lambda data: (calls.append(len(data)), load_image(data))[1])
    with serve(new_omni()) as running:
        for question, num_calls in (("What?", 1), ("Is it red?", 1), ("Why?", 2)):
            if question == "Why?":
                running.engine.prefix_cache.max_bytes = 0
                monkeypatch.setattr(running.engine.prefix_cache, "find", lambda key, ids: None)
            answer = ask(running.client, [about(data_url(drawing(seed=2)), question)], max_tokens=5).choices[0].message.content
            assert answer == omni.describe(drawing(seed=2), question, max_new_tokens=5) and len(calls) == num_calls
        running.settle()


def test_streamed_pieces_are_the_whole_answer(client, omni):
    chunks = list(ask(client, [about(data_url(drawing()), "What?")], max_tokens=30, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == omni.describe(drawing(), "What?", max_new_tokens=30)
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason in ("length", "stop")
    assert len(chunks) > 5, "the answer came in one piece"
    assert chunks[-1].choices == [] and 5 < chunks[-1].usage.completion_tokens <= 30
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks[:-1])


@pytest.mark.parametrize("stream", [False, True])
def test_n_answers_are_those_of_their_streams(client, omni, stream):
    options = {"temperature": 1.0, "top_p": 0.95, "seed": 5, "max_tokens": 10, "n": 3}
    found = ask(client, "Hello", stream=stream, **options)
    texts = [""] * 3
    for choice in (choice for chunk in found for choice in chunk.choices) if stream else found.choices:
        texts[choice.index] += (choice.delta if stream else choice.message).content or ""
    first = ask(client, "Hello", **(options | {"n": 1})).choices[0].message.content
    assert texts[0] == first == omni.chat().ask("Hello", max_new_tokens=10, temperature=1.0, top_p=0.95, seed=5)
    assert len(set(texts)) == 3


def test_more_answers_than_slots(new_omni, serve):
    with serve(new_omni(num_slots=2)) as small:
        texts = [choice.message.content for choice in ask(small.client, "Hi", n=5, temperature=1.0, seed=2, max_tokens=8).choices]
        small.settle()
    with serve(new_omni(num_slots=8)) as large:
        assert [choice.message.content for choice in ask(large.client, "Hi", n=5, temperature=1.0, seed=2, max_tokens=8).choices] == texts


def test_seeds(client):
    texts = [ask(client, "Hi", temperature=1.0, seed=seed, max_tokens=12).choices[0].message.content for seed in (1, 2, 1)]
    assert texts[0] == texts[2] != texts[1]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_list", [False, True])
def test_stop_strings(client, omni, stream, as_list):
    whole = omni.chat().ask("Tell me", max_new_tokens=60)
    stop = whole[len(whole) // 2 :][:2]
    found = ask(client, "Tell me", stop=[stop] if as_list else stop, max_tokens=60, stream=stream)
    choices = [chunk.choices[0] for chunk in found] if stream else found.choices
    text = "".join((choice.delta if stream else choice.message).content or "" for choice in choices)
    assert text == whole[: whole.index(stop)].strip() and choices[-1].finish_reason == "stop"


def test_parts_of_text_are_lines(client):
    content = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    answers = [
        ask(client, [{"role": "user", "content": value}], max_tokens=8).choices[0].message.content for value in (content, "one\ntwo")
    ]
    assert answers[0] == answers[1]


def test_parameters_that_change_nothing_are_taken(client):
    options = {"presence_penalty": 0, "frequency_penalty": 0, "logprobs": False, "user": "me", "metadata": {"a": "b"}, "tools": []}
    options |= {"tool_choice": "auto", "parallel_tool_calls": True, "modalities": ["text"], "extra_body": {"top_logprobs": 0, "foo": None}}
    assert ask(client, "Hi", max_completion_tokens=3, **options).usage.completion_tokens == 3


def test_a_dumped_answer_goes_back_into_the_conversation(client):
    """With all that the `openai` package knows of a message at null."""
    first = {"role": "user", "content": "Hi"}
    answer = ask(client, [first], max_tokens=5).choices[0].message
    second = {"role": "user", "content": "Why?"}
    plain = {"role": "assistant", "content": answer.content}
    found = [ask(client, [first, turn, second], max_tokens=5).choices[0].message for turn in (answer, answer.model_dump(), plain)]
    assert len(answer.model_dump()) > 3 and found[0] == found[1] == found[2]


@pytest.mark.parametrize("role", ["system", "developer"])
def test_instructions_are_put_in_front_of_the_first_question(client, role):
    image = data_url(drawing())
    later = [{"role": "assistant", "content": "A zoo"}, {"role": "user", "content": "Why?"}]
    instructions = [{"role": role, "content": "Be kind"}, {"role": "system", "content": [{"type": "text", "text": "Be short"}]}]
    found = ask(client, [*instructions, about(image, "What?"), *later], max_tokens=8)
    expected = ask(client, [about(image, "Be kind\nBe short\nWhat?"), *later], max_tokens=8)
    assert found.choices == expected.choices and found.usage.prompt_tokens == expected.usage.prompt_tokens


def test_usage_of_a_stream_is_null_until_the_end(http):
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "stream": True}
    for options, values in (({}, {"none"}), ({"stream_options": {"include_usage": True}}, {None})):
        lines = http.post("/v1/chat/completions", json=body | options).text.split("\n\n")
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        usages = [chunk.get("usage", "none") for chunk in chunks]
        assert set(usages[:-1]) == values and lines[-2] == "data: [DONE]"
        assert usages[-1] == "none" or usages[-1]["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        ([], {}, "messages: List should have at least 1 item"),
        ("", {}, "question '' is empty"),
        ([{"role": "system", "content": "Be kind"}], {}, "no question to answer"),
        (
            [{"role": "tool", "content": "Be kind", "tool_call_id": "1"}],
            {},
            "messages.0.role: Input should be 'user', 'assistant', 'system' or",
        ),
        ([{"role": "assistant", "content": "Hi"}], {}, "message 1 has role 'assistant'"),
        ([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi"}], {}, "no question to answer"),
        ("Hi", {"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
        ("Hi", {"max_tokens": 100_000}, "max_tokens=100000 is too many, pass at most"),
        ("Hi", {"max_tokens": 1, "max_completion_tokens": 1}, "pass one of them"),
        ("Hi" * 300, {}, "maximum context length is 400 tokens, of which the conversation takes 6[0-9][0-9]; shorten it"),
        ("Hi" * 20_000, {}, "the limit is 20000"),
        ("Hi", {"n": 9}, "n=9 is too many; pass at most 8"),
        ("Hi", {"temperature": 3}, "temperature: Input should be less than"),
        ("Hi", {"top_p": 0}, "top_p: Input should be greater than 0"),
        ("Hi", {"seed": -1}, "seed: Input should be greater"),
        ("Hi", {"presence_penalty": 1.0}, "presence_penalty: Input should be less than"),
        ("Hi", {"logprobs": True}, "logprobs: Input should be False"),
        ("Hi", {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools: List should have at most 0"),
        ("Hi", {"extra_body": {"nonsense": 1}}, "nonsense: Extra inputs are not permitted"),
        ("Hi", {"stop": ["a"] * 5}, "stop"),
        ("Hi", {"stop": ""}, "stop"),
        ("Hi", {"extra_body": {"state_id": "state-none"}}, "no such state"),
        ("Hi", {"stream_options": {"include_usage": True}}, "stream_options come with stream=true only"),
        ([{"role": "user", "content": None}], {}, "messages.0.content: Input should be a valid string"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], {}, "messages.0.content.0.text: Input should be a valid string"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], {}, "messages.0.content.0.image_url.url: Field required"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], {}, "messages.0.content.0: Input tag 'input_audio' found"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}, {"role": "system", "content": "a"}],
            {},
            "in front of the",
        ),
        (
            [{"role": "system", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}, {"role": "user", "content": "a"}],
            {},
            "first q",
        ),
    ],
)
def test_what_the_model_cannot_do(client, messages, options, message):
    with pytest.raises((openai.BadRequestError, openai.NotFoundError), match=message) as error:
        ask(client, messages, **options)
    assert error.value.body["type"] == "invalid_request_error" and error.value.status_code in (400, 404)


@pytest.mark.parametrize(("text", "options", "param"), [("Hi" * 300, {}, "messages"), ("Hi", {"max_tokens": 1000}, "max_tokens")])
def test_an_answer_without_room_has_the_code_that_clients_look_for(client, text, options, param):
    with pytest.raises(openai.BadRequestError, match="This|this model's maximum context length is 400 tokens") as error:
        ask(client, text, **options)
    assert (error.value.code, error.value.param) == ("context_length_exceeded", param)


def test_another_model(client):
    with pytest.raises(openai.NotFoundError, match="'gpt-4o' is not here; this server has 'tiny'") as error:
        client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "Hi"}])
    assert error.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([about("file:///etc/passwd", "What?")], "must be a data: URL"),
        ([about("/etc/passwd", "What?")], "must be a data: URL"),
        ([about("http://127.0.0.1/a.png", "What?")], "this server fetches no remote images"),
        ([about("data:image/png,abc", "What?")], "not of the form data:image/png;base64"),
        ([about("data:image/png;base64,%%%", "What?")], "not valid base64"),
        ([about("data:image/png;base64,AAAA", "What?")], "not a whole PNG, JPEG, WEBP, GIF file"),
        ([about(data_url(drawing()[:-400]), "What?")], "damaged or cut off"),
        ([about(data_url(drawing(form="TIFF")), "What?")], "not a whole PNG"),
        ([about(data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "What?")], "not a whole PNG"),
        ([about(data_url(drawing()), "One"), {"role": "assistant", "content": "a"}, about(data_url(drawing()), "Two")], "about one image"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}, about(data_url(drawing()), "Two")], "first question"),
    ],
)
def test_images_that_are_refused(client, messages, message):
    with pytest.raises(openai.BadRequestError, match=message) as error:
        ask(client, messages)
    assert error.value.param == "messages"


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "GIF"])
def test_formats(client, omni, form):
    data = drawing(form=form)
    response = ask(client, [about(data_url(data), "What?")], max_tokens=6)
    assert response.choices[0].message.content == omni.describe(data, "What?", max_new_tokens=6)
