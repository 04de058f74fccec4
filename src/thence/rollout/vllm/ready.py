"""Whether vLLM could be used, tried without starting it."""

from __future__ import annotations

import socket
import subprocess

from thence.errors import UserError
from thence.rollout.vllm.settings import PYTHON_VARIABLE, VllmSettings, address_of, shared_token

VLLM_SECONDS = 60.0


def check_vllm(settings: VllmSettings, table: str) -> None:
    """Make sure that vLLM can be started or reached.

    Args:
        table: what the settings are called in the recipe, for messages.

    Raises:
        UserError: no server listens, or the Python given has no vLLM.
    """
    field = "server" if settings.server else "servers"
    for server in (settings.server,) if settings.server else settings.servers:
        shared_token()
        try:
            socket.create_connection(address_of(server), timeout=5).close()
        except OSError as error:
            raise UserError(
                f"no vLLM server listens at {server}: {error}",
                remedy=f"start it first (docs/vllm.md), or let thence start vLLM: leave {field} out",
                field=f"{table}.{field}",
            ) from None
    if settings.server or settings.servers:
        return
    python = settings.interpreter()
    asked = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        done = subprocess.run(
            [python, "-c", asked],
            env=settings.variables(),
            capture_output=True,
            text=True,
            timeout=VLLM_SECONDS,
        )
        failed = done.returncode != 0
    except (OSError, subprocess.TimeoutExpired):
        failed = True
    if failed:
        raise UserError(
            f"{python} cannot import vLLM",
            remedy=f"give the Python of an environment in which vLLM is installed (vllm.python or {PYTHON_VARIABLE})",
            field=f"{table}.python",
        )
