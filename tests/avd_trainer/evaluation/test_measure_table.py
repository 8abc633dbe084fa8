import io
from dataclasses import replace

import torch
from rich.console import Console

from avd_trainer.evaluation.controls import Encoded
from avd_trainer.evaluation.measure_table import Row, markdown_table, rich_table
from avd_trainer.evaluation.measures import MEASURES, headlines
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


def test_the_terminal_shows_a_measure_a_line() -> None:
    table = rich_table(ROWS, REFERENCE, title="Students")
    console = Console(file=io.StringIO(), width=80)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "Students" in text
    assert "20 sets of 64" in text
    (header,) = (line for line in text.splitlines() if "teacher" in line)
    assert header.index("real") < header.index("teacher") < header.index("avd")
    (jerk,) = (line for line in text.splitlines() if "jerk (as real)" in line)
    assert jerk.split("│")[1:-1] == [" jerk (as real) ", " 1.100 ± 0.04 ", "   1.050 ", "                 12.3 ! "]
    assert "0.900 [0.850, 0.930] !" in text


def test_three_students_can_be_read_at_80_columns() -> None:
    spread = Spread(0.1234, 0.012, 0.1, 0.2)
    reference = replace(REFERENCE, spreads=dict.fromkeys(MEASURES, spread))
    rows = [Row(f"student-{number}", dict.fromkeys(MEASURES, 0.5)) for number in range(3)]
    console = Console(file=io.StringIO(), width=80)
    console.print(rich_table(rows, reference))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "…" not in text
    assert all(text.count(row.title) == 1 for row in rows)
    assert text.count("0.123 ± 0.01") == len(headlines(MEASURES))
