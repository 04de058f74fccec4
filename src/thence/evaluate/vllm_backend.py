"""Evaluation with vLLM in a separate environment: the same prompts, seeds and limits as the native backend."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from thence.errors import UserError
from thence.evaluate.backends import Generation, Prompts, Ready, Refused, Request
from thence.evaluate.playing import played
from thence.models.lengths import context_of
from thence.recipe import Model
from thence.rollout.native import Sampling
from thence.rollout.vllm.engine import VllmEngine
from thence.rollout.vllm.settings import VllmSettings
from thence.train.model import load_model, load_tokenizer, save_model
from thence.train.model_files import resolve

if TYPE_CHECKING:
    from thence.evaluate.suites import Task

PLAYED_AT_ONCE = 256
"""Rollouts of several turns that are played side by side; what ends later than the rest keeps them waiting."""


class VllmBackend:
    """Samples with vLLM; every response is given as it ends.

    A Hugging Face folder is opened by vLLM itself. Anything else (hub name, GGUF file, overridden configuration) is
    first opened here and written into a temporary folder, in float32.

    Args:
        settings: the model, as in a recipe.
        chat_template: "own", "none" or a Jinja file, see `thence.data.template.chat_format`.
        vllm: where vLLM runs and what it may use.
        variables: of the chat template.

    Raises:
        RecipeError: no such model or tokenizer.
        UserError: as `VllmEngine`; a chat template that cannot be read.
    """

    name = "vllm"

    def __init__(
        self,
        settings: Model,
        chat_template: str = "own",
        vllm: VllmSettings | None = None,
        variables: Mapping[str, Any] | None = None,
    ):
        vllm = vllm or VllmSettings()
        if vllm.servers or vllm.ranks_per_engine > 1:
            raise UserError(
                "servers and ranks_per_engine are for RL on several ranks; an evaluation has one engine",
                remedy="leave them out, or name one server",
                field="vllm",
            )
        self.settings, self.tokenizer = settings, load_tokenizer(settings)
        self._temporary: Path | None = None
        try:
            folder = self._folder()
            self.prompts = Prompts(self.tokenizer, chat_template, variables, configs_of(folder))
            self.engine = VllmEngine(vllm, folder)
        except BaseException:
            self.close()
            raise
        told = context_of(_config(folder))
        self.context = min(self.engine.max_model_len, told or self.engine.max_model_len)

    def generate(self, requests: Sequence[Request], task: Task) -> Iterator[tuple[Request, Generation | Refused]]:
        """See `Backend`."""
        if task.environment is not None:
            yield from played(requests, task, self.prompts, self.engine.sample, self.context, PLAYED_AT_ONCE)
            return
        ready, refused = self.prompts.prepare(requests, task, self.context)
        groups: dict[tuple[int, ...], list[Ready]] = {}
        for one in ready:
            groups.setdefault(one.stop_ids, []).append(one)
        for stop_ids, group in groups.items():
            stream = self.engine.stream(
                [one.token_ids for one in group],
                [one.request.seed for one in group],
                Sampling(task.max_tokens, task.temperature, task.top_p, stop_ids=stop_ids),
                limits=[one.room for one in group],
                logps=False,
            )
            # Left early, it has to stop at once, not when it is collected.
            with contextlib.closing(stream):
                for i, response in stream:
                    yield group[i].request, self.prompts.generation(group[i], response)
        yield from refused

    def facts(self) -> dict[str, Any]:
        """See `Backend`. `weights` is the digest of the safetensors files that vLLM has loaded."""
        about = {name: value for name, value in self.engine.facts().items() if name not in ("engine", "logprobs")}
        return {
            "backend": self.name,
            **about,
            "model": self.settings.path,
            "context": self.context,
            "chat_template": self.prompts.chat.template,
            "template_variables": dict(self.prompts.chat.variables),
        }

    def close(self) -> None:
        """End vLLM, or leave the server, and remove the temporary folder. May be called twice."""
        engine: VllmEngine | None = getattr(self, "engine", None)
        if engine is not None:
            engine.close()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _folder(self) -> Path:
        """The model as a folder that vLLM can open."""
        path = Path(resolve(self.settings.path or ""))
        ready = (path / "config.json").is_file() and any(path.glob("*.safetensors"))
        if ready and not self.settings.gguf_file and not self.settings.config_overrides:
            return path
        import torch

        self._temporary = Path(tempfile.mkdtemp(prefix="thence-vllm-model-"))
        loaded = load_model(self.settings, torch.device("cpu"))
        save_model(loaded.model, loaded.tokenizer, self._temporary)
        return self._temporary


def configs_of(folder: Path) -> SimpleNamespace:
    """The configurations of a model's folder, as a model has them; no generation config where there is no file."""
    from transformers import GenerationConfig

    has_file = (folder / "generation_config.json").is_file()
    generation = GenerationConfig.from_pretrained(folder) if has_file else None
    return SimpleNamespace(generation_config=generation, config=_config(folder))


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)
