"""Evaluation with thence's own sampler: any Hugging Face causal language model in this process."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from thence.evaluate.backends import Generation, Prompts, Ready, Refused, Request
from thence.evaluate.playing import played
from thence.models.lengths import context_of
from thence.recipe import Model
from thence.rollout.native import Sampling, sample, stream
from thence.train.model import load_model

if TYPE_CHECKING:
    from thence.evaluate.suites import Task

ROWS = 64
FINGERPRINT_VALUES = 1024  # of each weight tensor


class NativeBackend:
    """Samples with `thence.rollout.native` in float32, on a GPU if there is one.

    A response is given as soon as it ends. Long prompts come first: what does not fit into memory shows at once, and
    the time that is left is overestimated rather than underestimated.

    Args:
        settings: the model, as in a recipe.
        chat_template: "own", "none" or a Jinja file, see `thence.data.template.chat_format`.
        rows: most responses sampled in parallel; fewer need less memory.
        variables: of the chat template.

    Raises:
        RecipeError: no such model or tokenizer.
        UserError: a model that thence cannot take apart; a chat template that cannot be read.
    """

    name = "native"

    def __init__(
        self,
        settings: Model,
        chat_template: str = "own",
        rows: int = ROWS,
        variables: Mapping[str, Any] | None = None,
    ):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        loaded = load_model(settings, self.device)
        self.model: Any = loaded.model
        self.tokenizer, self.settings, self.rows = loaded.tokenizer, settings, rows
        self.prompts = Prompts(self.tokenizer, chat_template, variables, self.model)
        self.context = context_of(self.model.config)

    def generate(self, requests: Sequence[Request], task: Task) -> Iterator[tuple[Request, Generation | Refused]]:
        """See `Backend`. What does not fit the context comes last: others' answers show that not all are at fault."""
        if task.environment is not None:
            yield from played(requests, task, self.prompts, partial(sample, self.model), self.context, self.rows)
            return
        ready, refused = self.prompts.prepare(requests, task, self.context)
        groups: dict[tuple[int, tuple[int, ...]], list[Ready]] = {}
        for one in ready:
            groups.setdefault((one.room, one.stop_ids), []).append(one)
        for (room, stop_ids), group in groups.items():
            sampling = Sampling(room, task.temperature, task.top_p, stop_ids=stop_ids, rows=self.rows)
            for start in range(0, len(group), self.rows):
                wave = group[start : start + self.rows]
                token_ids, seeds = [one.token_ids for one in wave], [one.request.seed for one in wave]
                for i, response in stream(self.model, token_ids, seeds, sampling):
                    yield wave[i].request, self.prompts.generation(wave[i], response)
        yield from refused

    def facts(self) -> dict[str, Any]:
        """See `Backend`. `weights` identifies the weights: the same number for the same values."""
        import transformers

        return {
            "backend": self.name,
            "model": self.settings.path,
            **model_facts(self.model),
            "chat_template": self.prompts.chat.template,
            "template_variables": dict(self.prompts.chat.variables),
            "rows": self.rows,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def close(self) -> None:
        """Let go of the model."""
        self.model = None


def model_facts(model: torch.nn.Module) -> dict[str, Any]:
    """What a number depends on of a model at hand: its weights by their fingerprint, its size, where it is."""
    some = next(model.parameters())
    return {
        "weights": fingerprint(model),
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(some.dtype).removeprefix("torch."),
        "device": str(some.device),
        "context": context_of(model.config),
    }


def fingerprint(model: torch.nn.Module) -> str:
    """16 hex digits that follow from names, shapes and about a thousand evenly spread values of every weight."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().reshape(-1)
        values = flat[:: max(1, flat.numel() // FINGERPRINT_VALUES)].float().cpu().contiguous()
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]
