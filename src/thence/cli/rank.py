"""``thence`` as one rank of a run that a supervisor on this machine started: it ends when its standard input ends."""

from __future__ import annotations

import os
import sys
import threading


def _end_with_input() -> None:
    while os.read(0, 1):  # a buffered reader would be locked when Python ends
        pass
    os._exit(143)  # a run can be killed at any moment and taken up again


if __name__ == "__main__":
    threading.Thread(target=_end_with_input, daemon=True).start()
    from thence.cli import main

    sys.argv[0] = "thence"
    sys.exit(main(sys.argv[1:]))
