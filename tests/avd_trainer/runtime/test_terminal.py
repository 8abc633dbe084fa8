import io
import logging

import pytest
from rich.console import Console

from avd_core import NonFiniteError
from avd_trainer.runtime import terminal
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.terminal import readable_errors


@pytest.mark.parametrize("error", [UserError("Choose a new --output."), NonFiniteError("Lower the learning rate.")])
def test_what_a_person_can_mend_is_a_message(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(terminal, "console", Console(file=shown))
    with pytest.raises(SystemExit) as ended, readable_errors():
        raise error
    assert ended.value.code == 2
    assert shown.getvalue() == f"error: {error}\n"


def test_any_other_error_is_shown_as_it_is() -> None:
    with pytest.raises(RuntimeError, match="a fault of ours"), readable_errors():
        raise RuntimeError("a fault of ours")


def test_the_hub_speaks_once(capsys: pytest.CaptureFixture[str]) -> None:
    """It prints its messages by a handler of its own; ours, at the root, must not print them again."""
    hub = logging.getLogger("huggingface_hub")
    seen: list[logging.LogRecord] = []

    class Root(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record)

    handler = Root()
    logging.getLogger().addHandler(handler)
    try:
        with readable_errors():
            import huggingface_hub  # noqa: F401

            hub.getChild("utils._http").warning("Retrying in 1s [Retry 1/5].")
    finally:
        logging.getLogger().removeHandler(handler)
    assert not seen
    assert hub.handlers
