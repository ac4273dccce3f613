"""Conversations that the server keeps, as ids and as files."""

import contextlib
import socket
import time

import openai
import pytest

from omnimamba.server import states
from omnimamba.server.config import MIB, ServerConfig

from .conftest import MODEL, about, data_url, drawing


def ask(client, text, **extra):
    message = text if isinstance(text, dict) else {"role": "user", "content": text}
    return client.chat.completions.create(model=MODEL, messages=[message], max_tokens=8, extra_body=extra)


def test_a_kept_conversation_goes_on(client, omni):
    conversation = omni.chat(drawing())
    first = ask(client, about(data_url(drawing()), "What?"), keep_state=True)
    assert first.choices[0].message.content == conversation.ask("What?", max_new_tokens=8)
    state_id = first.choices[0].state_id
    for question in ("Why?", "And then?"):
        response = ask(client, question, state_id=state_id, keep_state=True)
        assert response.choices[0].message.content == conversation.ask(question, max_new_tokens=8)
        state_id = response.choices[0].state_id
    assert ask(client, "Why?", state_id=first.choices[0].state_id).usage.prompt_tokens < first.usage.prompt_tokens


def test_streams_say_the_state_last(client):
    message = {"role": "user", "content": "Hi"}
    options = {"max_tokens": 5, "n": 2, "temperature": 1.0, "stream": True}
    chunks = list(client.chat.completions.create(model=MODEL, messages=[message], extra_body={"keep_state": True}, **options))
    ids = [chunk.choices[0].state_id for chunk in chunks if chunk.choices[0].finish_reason]
    assert len(set(ids)) == 2
    for state_id in ids:
        ask(client, "And?", state_id=state_id)


def test_files_go_between_the_server_and_the_offline_api(client, http, omni, tmp_path):
    """Down from the server and on with `load_conversation`; up from `Conversation.save` and on in the server."""
    state_id = ask(client, about(data_url(drawing()), "What?"), keep_state=True).choices[0].state_id
    path = tmp_path / "state.safetensors"
    path.write_bytes(http.get(f"/v1/states/{state_id}").content)
    conversation = omni.load_conversation(path)
    assert [text for role, text in conversation.messages if role == "user"] == ["What?"]
    expected = conversation.ask("Why?", max_new_tokens=8)
    assert ask(client, "Why?", state_id=state_id).choices[0].message.content == expected
    conversation.save(path)
    uploaded = http.post("/v1/states", content=path.read_bytes()).json()["id"]
    assert ask(client, "And?", state_id=uploaded).choices[0].message.content == conversation.ask("And?", max_new_tokens=8)
    assert http.delete(f"/v1/states/{uploaded}").json()["deleted"] is True
    assert http.delete(f"/v1/states/{uploaded}").status_code == http.get(f"/v1/states/{uploaded}").status_code == 404
    with pytest.raises(openai.NotFoundError, match="no such state"):
        ask(client, "And?", state_id=uploaded)


def broken_files(good):
    yield b""
    yield b"\x80\x04\x95"  # the beginning of a pickle
    yield good[: len(good) // 2]
    yield b"\xff" * 8 + good[8:]
    yield good.replace(b"fingerprint", b"fingerpront")
    yield good.replace(b"unread_ids", b"unread_idx")
    start = good.index(b'\\"fingerprint\\"') if b'\\"fingerprint\\"' in good else good.index(b"fingerprint") + 14
    yield good[:start] + bytes([good[start] ^ 1]) + good[start + 1 :]


def test_files_that_are_no_state_of_this_model(client, http):
    state_id = ask(client, "Hi", keep_state=True).choices[0].state_id
    good = http.get(f"/v1/states/{state_id}").content
    assert http.post("/v1/states", content=good).status_code == 200
    for data in broken_files(good):
        response = http.post("/v1/states", content=data)
        assert response.status_code == 400 and "/tmp" not in response.text, data[:40]
        assert response.json()["error"]["message"]


@pytest.mark.parametrize("position", [-5, 10**12])
def test_positions_that_cannot_be(client, http, omni, tmp_path, position):
    conversation = omni.chat()
    conversation.ask("Hi", max_new_tokens=4)
    conversation.state.position.fill_(position)
    conversation.save(tmp_path / "state.safetensors")
    state_id = http.post("/v1/states", content=(tmp_path / "state.safetensors").read_bytes()).json()["id"]
    with pytest.raises(openai.BadRequestError):
        ask(client, "Why?", state_id=state_id)


def test_ids_that_cannot_be(http, omni, tmp_path):
    conversation = omni.chat()
    conversation.ask("Hi", max_new_tokens=4)
    conversation.unread_ids = [float("inf")]
    conversation.save(tmp_path / "state.safetensors")
    response = http.post("/v1/states", content=(tmp_path / "state.safetensors").read_bytes())
    assert response.status_code == 400 and "unread_ids are not those of a conversation" in response.text


def test_the_oldest_states_are_forgotten(new_omni, serve):
    omni = new_omni()
    with serve(omni, ServerConfig(state_bytes=2 * omni.engine.runner.state.bytes_per_slot)) as running:
        ids = [ask(running.client, "Hi", keep_state=True).choices[0].state_id for _ in range(3)]
        assert [running.http.get(f"/v1/states/{state_id}").status_code for state_id in ids] == [404, 200, 200]


def test_states_are_off_unless_switched_on(new_omni, serve):
    with serve(new_omni(), ServerConfig()) as running:
        with pytest.raises(openai.BadRequestError, match="keeps no states"):
            ask(running.client, "Hi", keep_state=True)
        assert running.http.post("/v1/states", content=b"").status_code == 404


def test_an_answer_that_a_stop_string_may_cut_is_not_kept(client):
    with pytest.raises(openai.BadRequestError, match="keep_state needs an answer that the model ends"):
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hi"}], stop="a", extra_body={"keep_state": True})


def test_a_state_takes_one_question(client):
    state_id = ask(client, "Hi", keep_state=True).choices[0].state_id
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    for given in (messages, [about(data_url(drawing()), "What?")], messages[1:2]):
        with pytest.raises(openai.BadRequestError, match="the next question alone"):
            client.chat.completions.create(model=MODEL, messages=given, extra_body={"state_id": state_id})


def test_a_file_of_a_large_state_is_taken_in(new_omni, serve):
    """Bodies of questions may be smaller than a state."""
    omni = new_omni()
    size = omni.new_engine().runner.state.bytes_per_slot
    with serve(omni, ServerConfig(state_bytes=10 * size, max_body_bytes=size // 2)) as running:
        state_id = ask(running.client, "Hi", keep_state=True).choices[0].state_id
        file = running.http.get(f"/v1/states/{state_id}").content
        assert len(file) > size // 2
        assert running.http.post("/v1/states", content=file).status_code == 200
        assert running.http.post("/v1/chat/completions", content=file).status_code == 413


def test_so_many_files_at_once_and_no_more(new_omni, serve, monkeypatch):
    """Each counts until its client has read it; small answers come all the same."""
    monkeypatch.setattr(states, "to_file", lambda conversation: bytes(64 * MIB))
    with serve(new_omni(num_slots=1), ServerConfig(state_bytes=50 * MIB, max_waiting=1)) as running, contextlib.ExitStack() as stack:
        path = f"/v1/states/{ask(running.client, 'Hi', keep_state=True).choices[0].state_id}"
        host, port = running.url.removeprefix("http://").split(":")
        for _ in range(2):
            connection = stack.enter_context(socket.create_connection((host, int(port)), timeout=20))
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            assert connection.recv(12) == b"HTTP/1.1 200"
        response = running.http.get(path)
        assert response.status_code == 429 and 1 <= int(response.headers["retry-after"]) <= 60
        assert running.http.get("/health").status_code == running.http.get("/v1/models").status_code == 200
        stack.close()
        deadline = time.monotonic() + 20
        while (response := running.http.get(path)).status_code == 429:
            assert time.monotonic() < deadline
        assert len(response.content) == 64 * MIB


def test_room_for_less_than_one_state(new_omni, serve):
    with (
        pytest.raises(ValueError, match="state_bytes=1000 has no room for one state, which takes"),
        serve(new_omni(), ServerConfig(state_bytes=1000)),
    ):
        pass
