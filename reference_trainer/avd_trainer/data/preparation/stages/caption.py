"""Captions: what is to be seen in a clip, in words."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from avd_trainer.data.preparation.frames import spread
from avd_trainer.data.preparation.needs import package_missing, weights_missing
from avd_trainer.data.preparation.stage import (
    ClipStage,
    Done,
    Failed,
    FrameRequest,
    Frames,
    Outcome,
    Row,
    StageSettings,
)

if TYPE_CHECKING:
    from avd_trainer.data.preparation.captioners import Endpoint, LocalModel

PROMPT = (
    "Describe this video in detail: which things and people are in it, their colours, what they do, and where they are "
    "in relation to each other. Keep to what can be seen: nothing about what it might mean, stand for or make one feel."
)
"""Asks for what the prompt of the paper's Fig. 11 asks for."""


class CaptionSettings(StageSettings):
    """Of captions. The paper's come from a 7B model of its own."""

    # Where and how patiently a server is asked changes no caption.
    DECIDES = StageSettings.DECIDES | {"endpoint", "key_variable", "timeout", "tries"}

    by: Literal["file", "transformers", "endpoint"] = "transformers"
    """Who writes them. ``file``: the text file beside the video, or else its name, for each of its clips. Otherwise a
    model, on this machine or behind an endpoint."""
    model: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    """For ``transformers``: a folder or hub id of a model of the Qwen-VL family. For ``endpoint``: its name there."""
    endpoint: str | None = Field(default=None, pattern="^https?://")
    """URL of a server with OpenAI's chat completions, up to the version: ``http://localhost:8000/v1``."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key of the endpoint, if it wants one. The key itself is not recorded."""
    prompt: str = PROMPT
    """What is asked about the frames."""
    frames: int = Field(default=8, ge=1)
    """Frames that the model sees, evenly spread."""
    short_side: int = Field(default=360, ge=28)
    """Height or width of these frames, whichever is less, in pixels."""
    max_tokens: int = Field(default=512, ge=1)
    """Of a caption; a longer one is cut off, and an error."""
    timeout: float = Field(default=60.0, gt=0)
    """Seconds to wait for an answer of the endpoint."""
    tries: int = Field(default=4, ge=1)
    """How often the endpoint is asked if it does not answer, is overloaded or fails."""
    time_limit: float = Field(default=300.0, gt=0)
    """Seconds for one clip, with all tries."""

    @model_validator(mode="after")
    def _has_an_endpoint(self) -> Self:
        if self.by == "endpoint" and self.endpoint is None:
            raise ValueError("by=endpoint needs the server's URL: set endpoint, such as http://localhost:8000/v1")
        return self


class Caption(ClipStage[CaptionSettings]):
    """A clip's caption: ``{"caption": text}``."""

    name = "caption"
    Settings = CaptionSettings
    of_survivors = True

    @classmethod
    def wants_gpu(cls, settings: StageSettings) -> bool:
        """With a model of its own. A server is asked by as many processes as there are, not by one for each GPU."""
        return isinstance(settings, CaptionSettings) and settings.by == "transformers"

    @classmethod
    def reads_caption(cls, settings: StageSettings) -> bool:
        """Where it is the text file's that is taken."""
        return isinstance(settings, CaptionSettings) and settings.by == "file"

    def missing(self) -> str | None:
        settings = self.settings
        if settings.by == "endpoint":
            return package_missing(self.name, "cv2", "prepare")
        if settings.by == "transformers":
            return package_missing(self.name, "transformers", "wan") or weights_missing(
                self.name, "model", settings.model
            )
        return None

    def frames(self, row: Row) -> FrameRequest | None:
        if self.settings.by == "file":
            return None
        return FrameRequest(spread(self.clip.frames, self.settings.frames), self.settings.short_side)

    def run(self, row: Row, frames: Frames) -> Outcome:
        if self.settings.by == "file":
            return Done({"caption": row.caption})
        from avd_trainer.data.preparation.captioners import Question

        answer = self._captioner(frames, Question(self.settings.prompt, self.settings.max_tokens))
        return answer if isinstance(answer, Failed) else Done({"caption": answer})

    def load(self) -> None:
        if self.settings.by != "file":
            _ = self._captioner

    @cached_property
    def _captioner(self) -> Endpoint | LocalModel:
        from avd_trainer.data.preparation.captioners import Endpoint, LocalModel

        settings = self.settings
        if settings.by == "transformers":
            return LocalModel(settings.model)
        assert settings.endpoint is not None
        return Endpoint(
            settings.endpoint,
            settings.model,
            key_variable=settings.key_variable,
            timeout=settings.timeout,
            tries=settings.tries,
        )


STAGE = Caption
