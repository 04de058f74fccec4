"""Why a process ended, from what it printed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from thence.audit.run.printed import last_cause, names_error, printed_lines
from thence.audit.run.program import _call

BAR = "\rtrain:  50%|█████     | 1/2 [00:01<00:01,  1.00s/it]\r 7it [00:02,  3.10it/s]"
TRACEBACK = 'Traceback (most recent call last):\n  File "train.py", line 3, in <module>\n    step()\n'


def test_progress_bars_colours_and_empty_lines_say_nothing() -> None:
    assert printed_lines(f"loading\r\n\n{BAR}\n\x1b[31mdisk full\x1b[0m{BAR}") == ["loading", "disk full"]
    assert printed_lines("saved 50% of it\n") == ["saved 50% of it"]


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (f"{TRACEBACK}ValueError: no rows\n{BAR}", "ValueError: no rows"),
        (f"{TRACEBACK}KeyboardInterrupt\nwandb: run ended", "KeyboardInterrupt"),
        (f"{TRACEBACK}ValueError: first\n\nDuring handling ...\n\n{TRACEBACK}OSError: then\n", "OSError: then"),
        ("".join(f"[rank1]: {line}\n" for line in f"{TRACEBACK}ValueError: here".split("\n")), "ValueError: here"),
        ("torch.OutOfMemoryError: CUDA\nended", "torch.OutOfMemoryError: CUDA"),
        ("the disk is full", None),
    ],
)
def test_the_end_of_the_last_traceback_is_the_cause(text: str, cause: str | None) -> None:
    assert last_cause(printed_lines(text)) == cause
    assert names_error("ValueError: x") and not names_error("no error")


def test_a_program_that_stops_behind_a_progress_bar_is_said_to_stop_for_its_error(tmp_path: Path) -> None:
    code = f"import sys; sys.stderr.write({BAR!r}); sys.stderr.flush(); "
    said = _call(
        [sys.executable, "-c", f"{code}print('the disk is full', file=sys.stderr); {code}sys.exit(3)"], tmp_path, 60
    )
    assert said == "exit code 3: the disk is full"
