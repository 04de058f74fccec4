"""How the vLLM engine is started or reached. Nothing here imports torch."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from thence.errors import UserError
from thence.rollout.vllm.wire import TOKEN_VARIABLE
from thence.settings.limits import Gigabytes, Processes, Rows, Seconds, Text, Written
from thence.settings.section import Section
from thence.settings.validation import validated

PYTHON_VARIABLE = "THENCE_VLLM_PYTHON"
# They belong to this Python, and would lead the other one astray.
_OWN_VARIABLES = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
CHILD = Path(__file__).with_name("child.py")
INSTALL = "install vLLM in a separate environment (docs/vllm.md) and set its Python"


class VllmSettings(Section):
    """Where vLLM runs and what it may use."""

    python: Text = ""
    """Python of the environment in which vLLM is installed; default: THENCE_VLLM_PYTHON, else this one."""
    server: Text = ""
    """Instead of starting vLLM: `127.0.0.1:PORT`, where the user has started child.py, on this machine."""
    servers: tuple[Text, ...] = ()
    """For RL on several ranks: one server for each rank, or for equal groups of neighbouring ranks, in their order."""
    ranks_per_engine: Processes = 1
    """For RL on several ranks: so many neighbouring ranks of a machine share one vLLM that thence starts."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of weights and arithmetic; float32 is what the trainer's log-probabilities agree with."""
    max_model_len: Annotated[int, Field(ge=8, le=10**7)] | None = None
    """Longest prompt and response together, in tokens; default: what the model was made for."""
    max_rows: Rows = 64
    """Most responses sampled in parallel."""
    kv_cache_gb: Gigabytes = 2.0
    """Memory for keys and values; 0 leaves it to vLLM, which takes most of what there is."""
    threads: Processes | None = None
    """Threads of vLLM on a CPU; default: what OMP_NUM_THREADS says, else all cores."""
    transfer: Literal["files", "ipc"] = "files"
    """How weights get to vLLM: in files that all engines of a machine read, or in chunks through memory both see."""
    compile: bool = False
    """Let vLLM compile the model: a slower start, faster sampling."""
    prefix_caching: bool = True
    """Read a prompt once for all its responses."""
    start_seconds: Seconds = 600.0
    """Longest time until the model is loaded."""
    silence_seconds: Seconds = 300.0
    """Longest time without a word from vLLM while it samples or takes weights."""
    log: Text = ""
    """File for what vLLM prints; default: a temporary one, whose end is shown when something fails."""
    environment: dict[str, Written] = Field(default_factory=dict)
    """Further environment variables of the process."""

    @model_validator(mode="after")
    def _servers_are_here(self) -> VllmSettings:
        for server in (self.server, *self.servers):
            if server:
                address_of(server)
        if self.server and self.servers:
            raise ValueError("server and servers are both given: give one of them")
        if self.transfer == "ipc" and (self.server or self.servers or self.ranks_per_engine > 1):
            raise ValueError(
                "transfer = ipc needs an engine for each rank that thence starts: no servers, ranks_per_engine = 1"
            )
        if self.ranks_per_engine > 1 and (self.server or self.servers):
            raise ValueError("ranks_per_engine is for engines that thence starts: leave it out beside a server")
        if not all(self.servers) or len(set(self.servers)) < len(self.servers):
            raise ValueError("servers names one of them twice, or an empty text: name each server once")
        return self

    def address(self) -> tuple[str, int]:
        """Host and port of `server`. Raises ValueError where they are not of this machine."""
        return address_of(self.server)

    def interpreter(self) -> str:
        """The Python that can import vLLM. Raises UserError."""
        named = self.python or os.environ.get(PYTHON_VARIABLE, "")
        if not named:
            if importlib.util.find_spec("vllm") is not None:
                return sys.executable
            raise UserError(
                "vLLM is not installed in thence's own environment",
                remedy=f"{INSTALL}: vllm.python, --vllm.python or {PYTHON_VARIABLE}",
                field="vllm.python",
            )
        found = shutil.which(str(Path(named).expanduser()) if os.sep in named else named)
        if found is None:
            raise UserError(
                f"no such Python: {named}",
                remedy="give the path of bin/python of the environment in which vLLM is installed",
                field="vllm.python" if self.python else PYTHON_VARIABLE,
            )
        return found

    def variables(self) -> dict[str, str]:
        """Environment variables of vLLM's process."""
        inherited = {name: value for name, value in os.environ.items() if name not in _OWN_VARIABLES}
        return inherited | self.environment

    def arguments(self, model: Path) -> list[str]:
        """Command-line arguments of `child.py` for these settings."""
        flags = ["--compile"] if self.compile else []
        flags += [] if self.prefix_caching else ["--no-prefix-caching"]
        flags += [] if self.transfer == "files" else ["--transfer", self.transfer]
        return [
            *("--model", str(model), "--dtype", self.dtype, "--max-rows", str(self.max_rows)),
            *("--max-model-len", str(self.max_model_len or 0), "--kv-cache-gb", str(self.kv_cache_gb)),
            *("--threads", str(self.threads or 0), *flags),
        ]


def address_of(server: str) -> tuple[str, int]:
    """Host and port of a server. Raises ValueError where they are not of this machine."""
    host, _, port = server.rpartition(":")
    try:
        host = host or "127.0.0.1"
        if (
            not (port.isascii() and port.isdecimal())
            or not 0 < int(port) < 65_536
            or not (host == "localhost" or ipaddress.ip_address(host).is_loopback)
        ):
            raise ValueError
    except ValueError:
        raise ValueError(
            f"server = {server!r} is not a port of this machine: write 127.0.0.1:PORT; weights are handed "
            "over in files, and the connection is not encrypted"
        ) from None
    return host, int(port)


def vllm_settings(table: Mapping[str, Any], where: str) -> VllmSettings:
    """Validate plain values.

    Args:
        where: the table's name, for the error.

    Raises:
        RecipeError: a setting that there is not, or a value that it cannot have.
    """
    return validated(VllmSettings, table, where)


def shared_token() -> str:
    """What a server asks of its clients. Raises UserError where it is not set."""
    token = os.environ.get(TOKEN_VARIABLE, "")
    if not token:
        raise UserError(
            f"a vLLM server asks for a token, and {TOKEN_VARIABLE} is not set",
            remedy=f"export {TOKEN_VARIABLE} with the text that the server was started with",
            field="vllm.server",
        )
    return token
