"""Models that describe clips: on this machine through transformers, or behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import base64
import inspect
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any, NamedTuple

import torch

from avd_trainer.data.preparation.stage import Failed, Frames
from avd_trainer.runtime.errors import UserError

QWEN_FAMILY = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Kinds of models whose inputs are made here. Their own processors need torchvision for video files, which frames as
pictures do not."""
# Answers by which a server says that it may take the same question in a moment.
BUSY = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
# Answers by which it says that the question itself is wrong; others, such as a wrong key or model, can be mended.
WRONG_QUESTION = frozenset({400, 413, 422})
JPEG_QUALITY = 90


class Question(NamedTuple):
    """What a captioner is asked about a clip.

    Attributes:
        prompt: Behind the frames.
        max_tokens: Of the answer.
    """

    prompt: str
    max_tokens: int


class Endpoint:
    """A captioner behind HTTP: vLLM, SGLang, llama.cpp, Ollama or a service with the same chat completions.

    Args:
        url: Up to the version, such as ``http://localhost:8000/v1``.
        model: Name of the model there.
        key_variable: Environment variable with the key of the service; none is sent if it is not set.
        timeout: Seconds to wait for an answer.
        tries: How often to ask, with pauses of 1, 2, 4, ... seconds between.
    """

    def __init__(self, url: str, model: str, *, key_variable: str, timeout: float, tries: int) -> None:
        self._url, self._model = f"{url.rstrip('/')}/chat/completions", model
        self._timeout, self._tries = timeout, tries
        key = os.environ.get(key_variable)
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def __call__(self, frames: Frames, question: Question) -> str | Failed:
        """Describe frames ``[F, H, W, 3]`` uint8 RGB; without luck, say why."""
        pictures = [{"type": "image_url", "image_url": {"url": _data_url(frame)}} for frame in frames]
        asked = {
            "model": self._model,
            "messages": [{"role": "user", "content": [*pictures, {"type": "text", "text": question.prompt}]}],
            "max_tokens": question.max_tokens,
            "temperature": 0.0,
        }
        request = urllib.request.Request(self._url, json.dumps(asked).encode(), self._headers)
        for attempt in range(self._tries):
            if attempt:
                time.sleep(2.0 ** (attempt - 1))
            answer, is_busy = self._ask(request)
            if not is_busy:
                break
        return answer

    def _ask(self, request: urllib.request.Request) -> tuple[str | Failed, bool]:
        """The answer, and whether to ask again in a moment."""
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as response:
                body = response.read()
        except urllib.error.HTTPError as error:
            with error:
                said = f"{self._url} answered {error.code} {error.reason}: {_beginning(error.read())}"
            return Failed(said, again=error.code not in WRONG_QUESTION), error.code in BUSY
        except (OSError, HTTPException) as error:
            return Failed(f"{self._url} did not answer: {getattr(error, 'reason', None) or error}", again=True), True
        try:
            choice = json.loads(body)["choices"][0]
            content, finish = choice["message"]["content"], choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError):
            said = f"{self._url} answered something else than a chat completion: {_beginning(body)}"
            return Failed(said, again=True), False
        return judge(content, cut_off=finish == "length"), False


class LocalModel:
    """A captioner of the Qwen-VL family, by transformers.

    Args:
        source: Folder, or id of the Hugging Face hub.

    Raises:
        UserError: If it is of another family.
        OSError: If it cannot be loaded.
    """

    def __init__(self, source: str) -> None:
        from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        kind = AutoConfig.from_pretrained(source).model_type
        if kind not in QWEN_FAMILY:
            raise UserError(
                f"{source} is of the kind {kind}, expected one of {', '.join(QWEN_FAMILY)}. Serve other models with "
                "vLLM or the like, and name the server by caption.endpoint."
            )
        cuda = torch.cuda.is_available()
        self._pictures = AutoImageProcessor.from_pretrained(source)
        self._tokenizer = AutoTokenizer.from_pretrained(source)
        dtype = torch.bfloat16 if cuda else torch.float32
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype).eval()
        self._model: Any = model.to("cuda" if cuda else "cpu")

    @torch.inference_mode()
    def __call__(self, frames: Frames, question: Question) -> str | Failed:
        """Describe frames ``[F, H, W, 3]`` uint8 RGB; without luck, say why."""
        inputs = self._inputs(frames, question.prompt)
        answer = self._model.generate(**inputs, max_new_tokens=question.max_tokens, do_sample=False)
        tokens = answer[0, inputs["input_ids"].shape[1] :]
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return judge(text, cut_off=len(tokens) >= question.max_tokens)

    def _inputs(self, frames: Frames, prompt: str) -> Mapping[str, torch.Tensor]:
        """As the family's processor makes them: each picture's place in the text repeats once per merged patch."""
        from PIL import Image

        pictures = self._pictures(images=[Image.fromarray(frame) for frame in frames], return_tensors="pt")
        content = [*({"type": "image"} for _ in frames), {"type": "text", "text": prompt}]
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        place = self._tokenizer.convert_ids_to_tokens(self._model.config.image_token_id)
        before, *behind = text.split(place)
        patches = (pictures["image_grid_thw"].prod(dim=1) // self._pictures.merge_size**2).tolist()
        whole = before + "".join(place * count + part for count, part in zip(patches, behind, strict=True))
        inputs = {**self._tokenizer(whole, return_tensors="pt", add_special_tokens=False), **pictures}
        if "mm_token_type_ids" in inspect.signature(self._model.forward).parameters:  # transformers 5
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == self._model.config.image_token_id).int()
        return {name: tensor.to(self._model.device) for name, tensor in inputs.items()}


def judge(text: object, *, cut_off: bool) -> str | Failed:
    """The caption, on one line; or why an answer is none."""
    if not isinstance(text, str) or not text.strip():
        return Failed("the captioner answered nothing")
    if cut_off:
        return Failed(f"the caption was cut off after {text[-40:]!r}; raise caption.max_tokens")
    return " ".join(text.split())


def _beginning(body: bytes) -> str:
    return body.decode(errors="replace").strip()[:300]


def _data_url(frame: Frames) -> str:
    import cv2

    written, jpeg = cv2.imencode(".jpg", frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    assert written
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg.tobytes()).decode()}"
