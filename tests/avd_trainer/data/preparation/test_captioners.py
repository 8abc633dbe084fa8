"""Captions from a model on disk, and from a small server that speaks OpenAI's chat completions."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from avd_trainer.data.preparation import captioners
from avd_trainer.data.preparation.captioners import Endpoint, LocalModel, Question, judge
from avd_trainer.data.preparation.stage import Failed
from avd_trainer.runtime.errors import UserError
from tiny_captioner import save_captioner

# More red than green, more green than blue.
FRAMES = np.random.default_rng(0).integers(0, [256, 128, 64], (3, 40, 60, 3), dtype=np.uint8)
QUESTION = Question("What is to be seen?", 64)


def completion(content: object, finish: str = "stop") -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": finish}]}


class Server(HTTPServer):
    """Gives the prepared answers in turn, the last one again and again, and keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: list[tuple[int, bytes]] = []
        self.asked: list[tuple[str, dict[str, str], Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def will_answer(self, *answers: tuple[int, object]) -> None:
        self.answers = [
            (code, body if isinstance(body, bytes) else json.dumps(body).encode()) for code, body in answers
        ]


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, dict(self.headers), body))
        code, answer = self.server.answers.pop(0) if len(self.server.answers) > 1 else self.server.answers[0]
        self.send_response(code)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would have been waited."""
    waited: list[float] = []
    monkeypatch.setattr(captioners.time, "sleep", waited.append)
    return waited


def ask(server: Server, **changes: Any) -> str | Failed:
    settings: dict[str, Any] = {"key_variable": "NO_SUCH_KEY", "timeout": 20.0, "tries": 3} | changes
    return Endpoint(server.url, "a-model", **settings)(FRAMES, QUESTION)


def test_an_endpoint_sees_the_frames_and_the_prompt(server: Server) -> None:
    server.will_answer((200, completion("A dog\nruns over  grass. ")))
    assert ask(server) == "A dog runs over grass."
    ((path, headers, body),) = server.asked
    assert path == "/v1/chat/completions"
    assert "Authorization" not in headers
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("a-model", 64, 0.0)
    (message,) = body["messages"]
    assert message["content"][-1] == {"type": "text", "text": QUESTION.prompt}
    for part, frame in zip(message["content"][:-1], FRAMES, strict=True):
        kind, jpeg = part["image_url"]["url"].split(",")
        assert kind == "data:image/jpeg;base64"
        shown = cv2.imdecode(np.frombuffer(base64.b64decode(jpeg), np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        assert np.abs(shown.astype(int).mean((0, 1)) - frame.mean((0, 1))).max() < 4  # red is red
        assert shown.shape == frame.shape


def test_a_key_is_sent_if_there_is_one(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_KEY", "of-the-service")
    server.will_answer((200, completion("A dog.")))
    ask(server, key_variable="SERVICE_KEY")
    assert server.asked[0][1]["Authorization"] == "Bearer of-the-service"


def test_a_busy_server_is_asked_again(server: Server, pauses: list[float]) -> None:
    server.will_answer((503, b"busy"), (429, b"slowly"), (200, completion("A dog.")))
    assert ask(server) == "A dog."
    assert pauses == [1.0, 2.0]


def test_a_server_that_stays_busy_is_tried_in_the_next_run(server: Server, pauses: list[float]) -> None:
    server.will_answer((503, b"busy"))
    answer = ask(server)
    assert isinstance(answer, Failed)
    assert answer.again
    assert "answered 503 Service Unavailable: busy" in answer.reason
    assert len(server.asked) == 3


def test_no_server(server: Server, pauses: list[float]) -> None:
    server.server_close()
    answer = ask(server)
    assert isinstance(answer, Failed)
    assert answer.again
    assert "did not answer: " in answer.reason
    assert len(pauses) == 2


@pytest.mark.parametrize(("code", "again"), [(400, False), (422, False), (401, True), (404, True)])
def test_what_another_try_would_not_mend_is_asked_once(server: Server, code: int, again: bool) -> None:
    server.will_answer((code, {"error": "this is wrong"}))
    answer = ask(server)
    assert isinstance(answer, Failed)
    assert answer.again == again
    assert "this is wrong" in answer.reason
    assert len(server.asked) == 1


@pytest.mark.parametrize("body", [b"<html>hello</html>", {"choices": []}, {"answer": "A dog."}, [1], {"choices": [7]}])
def test_something_else_than_a_completion(server: Server, body: object) -> None:
    server.will_answer((200, body))
    answer = ask(server)
    assert isinstance(answer, Failed)
    assert answer.again
    assert "something else than a chat completion" in answer.reason


@pytest.mark.parametrize(
    ("content", "finish", "reason"),
    [
        ("", "stop", "answered nothing"),
        (None, "stop", "answered nothing"),
        ("A dog runs over", "length", r"cut off after 'A dog runs over'; raise caption\.max_tokens"),
    ],
)
def test_answers_that_are_no_captions(server: Server, content: object, finish: str, reason: str) -> None:
    server.will_answer((200, completion(content, finish)))
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(ask(server))


def test_a_caption_is_one_line() -> None:
    assert judge("  a\n\tdog ", cut_off=False) == "a dog"


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    return LocalModel(str(save_captioner(tmp_path_factory.mktemp("captioner"))))


def test_a_model_on_disk_sees_every_frame(captioner: LocalModel) -> None:
    inputs = captioner._inputs(FRAMES, "What?")
    model = captioner._model
    assert inputs["image_grid_thw"].shape == (3, 3)
    places = int(inputs["image_grid_thw"].prod(dim=1).sum()) // 4  # 2 x 2 patches are merged to one token
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == places
    text = captioner._tokenizer.decode(inputs["input_ids"][0])
    assert text.startswith("<|im_start|>user\n<|vision_start|><|image_pad|>")
    assert text.endswith("<|vision_end|>What?<|im_end|>\n<|im_start|>assistant\n")
    with torch.no_grad():
        one, other = (model(**captioner._inputs(frames, "What?")).logits[0, -1] for frames in (FRAMES, 255 - FRAMES))
    assert not torch.equal(one, other)


def test_a_model_on_disk_answers(captioner: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of random weights never ends its answer; one that ends it is made of the same by its first token."""
    answer = captioner(FRAMES, QUESTION)
    assert isinstance(answer, Failed)
    assert "cut off" in answer.reason
    inputs = captioner._inputs(FRAMES, QUESTION.prompt)
    tokens = captioner._model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    last = next(place for place, token in enumerate(tokens) if place and token not in tokens[:place])
    monkeypatch.setattr(captioner._model.generation_config, "eos_token_id", int(tokens[last]))
    wanted = captioner._tokenizer.decode(tokens[: last + 1], skip_special_tokens=True)
    assert captioner(FRAMES, QUESTION) == " ".join(wanted.split())


def test_other_families_are_refused(clip_folder: Path) -> None:
    with pytest.raises(UserError, match=r"is of the kind clip, expected one of qwen2_vl.*caption\.endpoint"):
        LocalModel(str(clip_folder))
