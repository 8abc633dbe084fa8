"""``avd torchrun`` starts ranks, and tells how they ended in a line and not by a traceback."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RANK = """
import os, signal, sys, time
from pathlib import Path
from avd_trainer.runtime.signals import StopSignals
folder, end = Path(sys.argv[1]), sys.argv[2]
with StopSignals() as signals:
    (folder / os.environ["RANK"]).touch()
    if end == "fail" and os.environ["RANK"] == "1":
        sys.exit(3)
    while signals.received is None:
        time.sleep(0.05)
    time.sleep(0.3)  # as long as the launcher takes to send it again
    print(f"saved on {signals.received}", flush=True)
"""


@pytest.mark.parametrize(
    ("end", "status", "message"),
    [
        ("stop", 130, "SIGINT came, and all processes have ended. What they saved is told above."),
        ("fail", 1, "Rank 1 failed first, with status 3. What it said is above."),
    ],
)
def test_the_end_is_told_in_a_line(tmp_path: Path, end: str, status: int, message: str) -> None:
    program = tmp_path / "rank.py"
    program.write_text(RANK)
    command = [sys.executable, "-m", "avd_trainer", "torchrun", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    process = subprocess.Popen(
        [*command, "--rdzv-endpoint", "localhost:0", str(program), str(tmp_path), end],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 120
        while not all((tmp_path / rank).exists() for rank in "01"):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        if end == "stop":
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the launcher and to its processes
        printed, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == status, printed
    assert message in printed
    assert "Traceback" not in printed
    assert printed.count("saved on SIGINT") == (2 if end == "stop" else 0)
