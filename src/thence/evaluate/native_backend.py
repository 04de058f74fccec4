"""Evaluation with thence's own sampler: any Hugging Face causal language model in this process."""

from __future__ import annotations

import hashlib
import logging
import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from thence.evaluate.backends import Generation, Prompts, Refused, Request, response_text, room_for
from thence.models.lengths import context_of
from thence.recipe import Model
from thence.rollout.native import Sampling, stream
from thence.train.model import load_model

if TYPE_CHECKING:
    from thence.evaluate.suites import Task

log = logging.getLogger(__name__)
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
        """See `Backend`. Prompts that leave less than `max_tokens` of the context are counted in the log."""
        rendered = {r.problem.key: self.prompts.rendered(r.problem) for r in requests}
        prompts = {key: row.prompt_ids for key, row in rendered.items()}
        rooms = {key: room_for(len(ids), task.max_tokens, self.context) for key, ids in prompts.items()}
        warn_of_rooms(task, rooms, self.context)
        groups: dict[tuple[int, tuple[int, ...]], list[Request]] = {}
        for request in sorted(requests, key=lambda r: (-len(prompts[r.problem.key]), r.problem.key, r.sample)):
            place = rooms[request.problem.key], self.prompts.stop_ids(request.problem)
            groups.setdefault(place, []).append(request)
        for (room, stop_ids), group in groups.items():
            cut = room if room < task.max_tokens else None
            if room == 0:
                continue
            sampling = Sampling(room, task.temperature, task.top_p, stop_ids=stop_ids, rows=self.rows)
            for start in range(0, len(group), self.rows):
                wave = group[start : start + self.rows]
                own_prompts, seeds = [prompts[r.problem.key] for r in wave], [r.seed for r in wave]
                for i, response in stream(self.model, own_prompts, seeds, sampling):
                    opening = rendered[wave[i].problem.key].opening
                    text = response_text(self.tokenizer, response.token_ids, stop_ids, opening)
                    yield wave[i], Generation(text, len(response.token_ids), response.finish, cut)
        yield from refused_for_length(requests, prompts, rooms, self.context)

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


def warn_of_rooms(task: Task, rooms: dict[str, int], context: int | None) -> None:
    """Say how many prompts leave less of the context than the task's `max_tokens`."""
    short = [room for room in rooms.values() if 0 < room < task.max_tokens]
    if short:
        log.warning(
            "%s: %d of %d prompts leave fewer than max_tokens = %d of the model's context of %s; their responses are "
            "cut earlier, the shortest at %d tokens",
            *(task.name, len(short), len(rooms), task.max_tokens, context, min(short)),
        )


def refused_for_length(
    requests: Sequence[Request], prompts: Mapping[str, Sequence[int]], rooms: Mapping[str, int], context: int | None
) -> Iterator[tuple[Request, Refused]]:
    """The requests whose prompt leaves nothing of the model's context: no response is made up for them.

    They come last: others that were answered show that the fault is not everybody's.

    Args:
        prompts, rooms: tokens of the prompt, and most tokens of a response, by the problem's key.
    """
    for request in requests:
        if rooms[request.problem.key] == 0:
            length = len(prompts[request.problem.key])
            yield request, Refused("too long", f"the prompt has {length:,} tokens, the model's context {context:,}")


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
