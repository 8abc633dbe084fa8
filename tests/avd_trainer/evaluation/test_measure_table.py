import io

import torch
from rich.console import Console

from avd_trainer.evaluation.controls import Encoded
from avd_trainer.evaluation.measure_table import Row, markdown_table, rich_table
from avd_trainer.evaluation.reference import Reference, Spread

REFERENCE = Reference(
    {
        "visible": Spread(1.0, 0.0, 1.0, 1.0),
        "jerk": Spread(1.1, 0.04, 1.0, 1.2),
        "temporal_loss": Spread(0.7, 0.005, 0.69, 0.71),
    },
    sets=20,
    clips=64,
    real=Encoded(torch.zeros(1), torch.zeros(1)),
)
ROWS = [
    Row("teacher", {"visible": 0.995, "jerk": 1.05, "temporal_loss": 0.9}),
    Row("avd", {"visible": 0.9, "jerk": 12.34}, {"visible": (0.85, 0.93)}),
]
CONTROLS = [Row("white noise", {"visible": 0.01, "jerk": 16.0})]


def test_markdown_has_real_clips_first_then_rows_then_controls() -> None:
    assert markdown_table(ROWS, REFERENCE, CONTROLS) == (
        "|  | visible (high) | jerk (as real) |\n"
        "| --- | --: | --: |\n"
        "| real | 1.000 ± 0 | 1.100 ± 0.04 |\n"
        "| teacher | 0.995 | 1.050 |\n"
        "| avd | 0.900 [0.850, 0.930] ! | 12.3 ! |\n"
        "| *white noise* | 0.010 ! | 16.0 ! |\n"
        "\n"
        "real: mean ± standard deviation of 20 sets of 64 real clips.\n"
        "!: worse than real clips by more than 4 standard deviations and 1% of the mean.\n"
    )


def test_other_measures_can_be_named() -> None:
    table = markdown_table(ROWS, REFERENCE, names=["temporal_loss"])
    assert "| teacher | 0.900 ! |" in table
    assert "| avd |  |" in table
    assert "temporal loss (as real)" in table


def test_the_terminal_shows_the_same() -> None:
    table = rich_table(ROWS, REFERENCE, CONTROLS, title="Students")
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for cell in ("Students", "1.000 ± 0", "0.900 [0.850, 0.930] !", "white noise", "16.0 !", "20 sets of 64"):
        assert cell in text
