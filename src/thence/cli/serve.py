"""``thence serve``."""

from __future__ import annotations

import errno
from typing import Annotated

from annotated_types import Ge, Le

from thence.errors import UserError

Port = Annotated[int, Ge(0), Le(65535)]


def serve_command(*runs: str, port: Port = 8765) -> int:
    """Show the pages of runs, evaluations and comparisons in a browser on this machine; a run's page grows with it.

    It listens on 127.0.0.1 alone, reads only, and ends with Control-C.

    Examples:

      thence serve
      thence serve quickstart-seed0 evals/gsm8k-mine --port 9000

    Args:
        runs: Folders, or names under runs/ or evals/. Default: all that are there.
        port: Where the browser finds it: http://127.0.0.1:PORT/. 0 takes a free one.
    """
    from thence.pages.served.server import PageServer
    from thence.pages.served.shelf import shelf_of

    shelf = shelf_of(runs)
    try:
        server = PageServer(shelf, port)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        why = "is in use" if error.errno == errno.EADDRINUSE else "is not free for you to take"
        raise UserError(f"port {port} {why}", remedy="give another, or 0 for a free one", field="--port") from None
    with server:
        print(f"serving {len(shelf.folders)} at {server.url}; Control-C ends it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("\nended")
    return 0
