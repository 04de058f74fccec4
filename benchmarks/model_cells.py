"""What the model matrix asks of one architecture: each cell holds thence against transformers.

The other side of every comparison is the untouched model: opened by ``AutoModelForCausalLM.from_pretrained``, run in
float64, one row at a time, without padding, packing or cache.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.models import tiny_models
from thence.data.worlds.vocabulary import build_tokenizer
from thence.errors import UserError
from thence.objective import Batch, Logp, Row, Term
from thence.recipe import Model
from thence.rollout.native import Sampling, sample
from thence.train.checkpoint import newest_checkpoint, publish, write_checkpoint
from thence.train.model import load_model, save_model
from thence.train.parallel import SingleProcess
from thence.train.policy import Policy
from thence.train.probe import check_gradient
from thence.train.state import load_weights
from thence.train.step import StepSettings, train_step
from thence.train.trainer import Trainer

CPU = torch.device("cpu")
SEED = 0
LENGTHS = ((3, 20), (5, 36), (2, 9), (4, 28), (1, 13))  # prompt and response tokens of the rows; the window is 8
BUDGET = 90  # tokens of a micro-batch: the rows go into several
PROMPTS = (2, 5, 11, 11, 19)  # lengths of the sampled prompts, each taken three times
STOPS = (3, 9, 14, 20)  # of 26 tokens: rows end early, so that the cache is cut while others go on
NEW_TOKENS = 24
# A model computes norms and softmaxes in float32 whatever its weights are, so float64 does not reach 1e-12.
# A step is taken in float64, which shows a small fault, and in float32, which is what a user runs: other kernels.
LOGP_TOLERANCE = {torch.float64: 1e-4, torch.float32: 2e-3}  # nats
GRADIENT_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-2}  # relative, of the whole gradient and each parameter's
SAMPLED_TOLERANCE = 2e-3  # nats, of the sampler (float32 weights)
CELLS = ("open", "step", "packed", "sampled", "checkpoint", "published", "lora")


@dataclass(frozen=True)
class Cell:
    """How one cell ended.

    Args:
        verdict: ``works``, ``refused`` (a UserError), ``traceback`` (any other exception), ``wrong`` (beyond the
            tolerance), ``not yet`` (the package that it needs is missing) or ``not run``.
        detail: the reason or the last line of the exception.
        figures: what was measured.
    """

    verdict: str
    detail: str = ""
    figures: dict[str, float] = field(default_factory=dict)


class Difference(Exception):
    """Two sides differ by more than the tolerance."""

    def __init__(self, detail: str, figures: dict[str, float]):
        super().__init__(detail)
        self.detail, self.figures = detail, figures


@dataclass(frozen=True)
class Case:
    """A tiny model on disk."""

    kind: str
    folder: Path

    def opened(self) -> Any:
        """The model as thence opens it, in float32, and the tokenizer."""
        return load_model(Model(path=str(self.folder), compute_dtype="float32"), CPU)

    def opened_exact(self) -> Any:
        """The model as thence opens it, turned to float64 afterwards where the model's code can do that."""
        return self._exact(self.opened().model)

    def untouched(self) -> Any:
        """The model as transformers opens it, in float64 where its code can do that."""
        from transformers import AutoModelForCausalLM

        return self._exact(AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval())

    def _exact(self, model: Any) -> Any:
        """float64 has no grouped product of experts' matrices: transformers is told to loop over them."""
        if model._can_set_experts_implementation():
            model.set_experts_implementation("eager")
        try:
            _logits(model.double(), rows()[0].token_ids[None])
        except RuntimeError:  # a constant or a cast of its own that only float32 fits (XGLM, Inkling 2)
            return model.float()
        return model


def run_cells(kind: str) -> Iterator[tuple[str, Cell]]:
    """Every cell of an architecture, in order. A model that thence does not open is refused in all of them."""
    with tempfile.TemporaryDirectory(prefix="thence-matrix-") as place:
        case = Case(kind, Path(place) / "model")
        model = tiny_models.tiny_model(kind, SEED)
        model.save_pretrained(case.folder)
        build_tokenizer().save_pretrained(case.folder)
        first = judge(lambda: cell_open(case, model))
        yield "open", first
        for name, run in RUNS.items():
            if first.verdict == "works":
                yield name, judge(lambda run=run, name=name: _as_a_run_does(case, name, run))
            else:
                word = first.verdict if first.verdict == "refused" else "not run"
                yield name, Cell(word, first.detail if word == "refused" else "the model does not open")


def _as_a_run_does(case: Case, name: str, run: Callable[[Case], Cell | dict[str, float]]) -> Cell | dict[str, float]:
    """The cell, after what a run tries on its model before the first step."""
    if name in ("step", "packed", "checkpoint", "published"):
        check_gradient(case.opened().model, packing=name == "packed")
    return run(case)


def judge(run: Callable[[], Cell | dict[str, float]]) -> Cell:
    """Run one cell and give its verdict."""
    try:
        result = run()
    except UserError as error:
        return Cell("refused", str(error).replace("\n  remedy: ", "; remedy: "))
    except Difference as difference:
        return Cell("wrong", difference.detail, difference.figures)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())[:300]
        return Cell("traceback", f"{type(error).__name__}: {text} ({Path(place.filename).name}:{place.lineno})")
    return result if isinstance(result, Cell) else Cell("works", "", result)


def cell_open(case: Case, built: Any) -> dict[str, float]:
    """thence opens the folder and finds the weights that were saved, bit by bit."""
    loaded = case.opened()
    before, after = built.state_dict(), loaded.model.state_dict()
    _same_state(before, after, "opened weights")
    return {"parameters": float(sum(p.numel() for p in built.parameters()))}


def cell_step(case: Case) -> dict[str, float]:
    """Loss, every token's log-probability and the gradient of ``train_step``, rows padded."""
    expected = restated(case.untouched(), batch())
    figures = _step(case.opened_exact(), False, expected)
    _step(case.opened().model, False, expected)
    return figures


def cell_packed(case: Case) -> dict[str, float]:
    """The same with rows packed end to end; and the model is the same afterwards."""
    expected = restated(case.untouched(), batch())
    _pack(case.opened().model, expected)
    try:
        return _pack(case.opened_exact(), expected)
    except UserError:  # what float32 does inside a float64 model is more than the check allows there; users run float32
        return {"float32_only": 1.0}


def _pack(model: Any, expected: Restated) -> dict[str, float]:
    """A packed step twice, then a padded one; the model's logits stay as they were."""
    ids = rows()[1].token_ids[None]
    before = _logits(model, ids)
    figures = _step(model, True, expected)
    _step(model, True, expected)
    moved = float((_logits(model, ids) - before).abs().max())
    if moved > 1e-5:
        raise Difference("the model gives other logits after a packed pass", figures | {"after": moved})
    _step(model, False, expected)
    return figures


def cell_sampled(case: Case) -> dict[str, float]:
    """Log-probabilities of sampled tokens, and the choice of greedy ones, against a plain forward pass."""
    model, reference = case.opened().model, case.untouched()
    generator = torch.Generator().manual_seed(SEED)
    distinct = [torch.randint(tiny_models.VOCAB, (n,), generator=generator).tolist() for n in PROMPTS]
    prompts = [prompt for prompt in distinct for _ in range(3)]
    worst, short = 0.0, 0
    for temperature in (1.0, 0.0):
        sampling = Sampling(NEW_TOKENS, temperature=temperature, stop_ids=STOPS)
        for prompt, response in zip(prompts, sample(model, prompts, range(len(prompts)), sampling), strict=True):
            log_p = _log_probabilities(reference, [*prompt, *response.token_ids])[len(prompt) - 1 :]
            taken = log_p.gather(1, torch.tensor(response.token_ids)[:, None])[:, 0]
            worst = max(worst, float((taken - torch.tensor(response.logps, dtype=taken.dtype)).abs().max()))
            if temperature == 0:
                worst = max(worst, float((log_p.max(1).values - taken).max()))
            short += response.finish == "stop"
    figures = {"logp": worst, "ended_early": float(short)}
    if not worst <= SAMPLED_TOLERANCE:
        raise Difference(f"sampled log-probabilities are off by {worst:.2g} nats", figures)
    return figures


def cell_checkpoint(case: Case) -> dict[str, float]:
    """Stopped after a step and resumed in a fresh model: the same bits, and the same bits after the next step."""
    loaded = case.opened()
    trainer = _trainer(loaded.model)
    trainer.step(batch())
    plain, tensors = trainer.state()
    with tempfile.TemporaryDirectory() as place:
        write_checkpoint(Path(place), 1, loaded.model, loaded.tokenizer, {"trainer": plain}, tensors)
        found = newest_checkpoint(Path(place))
        assert found is not None
        fresh = case.opened().model
        load_weights(fresh, found.folder)
        kept = found.tensors
    _same_state(loaded.model.state_dict(), fresh.state_dict(), "resumed weights")
    ids = rows()[1].token_ids[None]
    _same_logits(_logits(loaded.model, ids), _logits(fresh, ids), "the resumed model")
    again = _trainer(fresh)
    again.restore(found.plain["trainer"], kept)
    trainer.step(batch())
    again.step(batch())
    _same_state(loaded.model.state_dict(), fresh.state_dict(), "weights a step after resuming")
    return {}


def cell_published(case: Case) -> dict[str, float]:
    """The trained model, published, opens in transformers with the same logits and the same tied weights."""
    from transformers import AutoModelForCausalLM

    loaded = case.opened()
    _trainer(loaded.model).step(batch())
    with tempfile.TemporaryDirectory() as place:
        temporary, final = Path(place) / ".writing", Path(place) / "model"
        temporary.mkdir()
        save_model(loaded.model, loaded.tokenizer, temporary)
        publish(temporary, final)
        opened = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32).eval()
    ids = rows()[1].token_ids[None]
    _same_logits(_logits(loaded.model, ids), _logits(opened, ids), "the published model")
    if _is_tied(loaded.model) != _is_tied(opened):
        raise Difference("the embeddings are tied in one of the two and not in the other", {})
    return {}


def cell_lora(case: Case) -> Cell:
    """A model with an adapter of peft."""
    try:
        import peft  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        return Cell("not yet", "peft is not installed")
    return Cell("not yet", "the matrix has no cell for adapters yet")


RUNS: dict[str, Callable[[Case], Cell | dict[str, float]]] = {
    "step": cell_step,
    "packed": cell_packed,
    "sampled": cell_sampled,
    "checkpoint": cell_checkpoint,
    "published": cell_published,
    "lora": cell_lora,
}


def rows() -> list[Row]:
    """Random rows, longer than the window, with a random positive weight for every trained token."""
    generator = torch.Generator().manual_seed(SEED + 1)
    made = []
    for prompt, response in LENGTHS:
        ids = torch.randint(tiny_models.VOCAB, (prompt + response,), generator=generator)
        trained = torch.arange(len(ids)) >= prompt
        weights = 0.5 + torch.rand(1, response, generator=generator, dtype=torch.float64)
        made.append(Row(ids, trained, weights))
    return made


def batch() -> Batch:
    """The rows with the term of supervised fine-tuning."""
    return Batch((Term("logp", Logp()),), tuple(rows()))


Restated = tuple[float, list[Tensor], dict[str, Tensor]]


def _step(model: Any, packing: bool, expected: Restated) -> dict[str, float]:
    """Take a step that moves nothing and hold what it computed against the plain re-statement."""
    made, measured = batch(), {}
    dtype = next(model.parameters()).dtype

    def observe(group: Any, stats: Any) -> None:
        sizes = [made.rows[i].n_trained for i in group]
        measured.update(zip(group, stats.logp_T.split(sizes), strict=True))

    still = torch.optim.SGD(model.parameters(), lr=0.0)
    report = train_step(Policy(model), still, made, SingleProcess(), StepSettings(BUDGET, packing, 0.0, dtype), observe)
    loss, logps, gradients = expected
    figures = {
        "loss": abs(report.loss - loss) / max(1.0, abs(loss)),
        "logp": max(float((measured[i] - logp).abs().max()) for i, logp in enumerate(logps)),
    } | _gradient_differences({n: p.grad for n, p in model.named_parameters()}, gradients)
    where = str(dtype).removeprefix("torch.")
    if not max(figures["logp"], figures["loss"]) <= LOGP_TOLERANCE[dtype]:
        raise Difference(f"log-probabilities are off by {figures['logp']:.2g} nats in {where}", figures)
    if not max(figures["gradient"], figures["worst_parameter"]) <= GRADIENT_TOLERANCE[dtype]:
        raise Difference(f"the gradient is off by {figures['gradient']:.2g} of its length in {where}", figures)
    return figures


def restated(model: Any, made: Batch) -> Restated:
    """Loss, log-probabilities of each row's trained tokens, and gradients by name: plain, row by row."""
    count, total, logps = sum(row.n_trained for row in made.rows), 0.0, []
    for row in made.rows:
        log_p = model(input_ids=row.token_ids[None], use_cache=False).logits[0].double().log_softmax(-1)[:-1]
        taken = log_p.gather(1, row.token_ids[1:, None])[:, 0][row.trained[1:]]
        loss = -(row.weights[0] * taken).sum() / count
        loss.backward()
        total += loss.item()
        logps.append(taken.detach())
    named = dict(model.named_parameters())
    return total, logps, {name: p.grad for name, p in named.items() if p.grad is not None}


def _gradient_differences(got: dict[str, Tensor | None], expected: dict[str, Tensor]) -> dict[str, float]:
    """Distance of the whole gradient and of the worst parameter's, relative; tiny ones against the whole."""
    if missing := set(expected) - set(got):
        raise Difference(f"parameters without a gradient: {sorted(missing)[:3]}", {})
    length = float(torch.stack([g.norm() for g in expected.values()]).norm())
    distances, worst = [], 0.0
    for name, gradient in got.items():
        reference = expected.get(name)
        reference = torch.zeros((), dtype=torch.float64) if reference is None else reference
        distance = float(((torch.zeros_like(reference) if gradient is None else gradient) - reference).norm())
        distances.append(distance)
        worst = max(worst, distance / max(float(reference.norm()), 1e-2 * length))
    return {"gradient": float(torch.tensor(distances).norm()) / length, "worst_parameter": worst}


def _trainer(model: Any) -> Trainer:
    return Trainer(model, 1e-3, StepSettings(BUDGET, False, 1.0, torch.float32))


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def _log_probabilities(model: Any, ids: list[int]) -> Tensor:
    """Of what follows each token but the last, shape (tokens - 1, V)."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].double().log_softmax(-1)


def _same_state(expected: dict[str, Tensor], got: dict[str, Tensor], what: str) -> None:
    names = set(expected) ^ set(got)
    changed = [name for name in expected if name in got and not torch.equal(expected[name], got[name])]
    if names or changed:
        raise Difference(f"{what} differ: {sorted(names)[:2] + changed[:3]}", {"tensors": float(len(changed))})


def _same_logits(expected: Tensor, got: Tensor, what: str) -> None:
    if not torch.equal(expected, got):
        difference = float((expected - got).abs().max())
        raise Difference(f"{what} gives other logits, by {difference:.2g}", {"logits": difference})


def _is_tied(model: Any) -> bool:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and embedding is not None and head.weight is embedding.weight


def as_plain(cells: dict[str, Cell]) -> dict[str, Any]:
    """For JSON."""
    return {name: asdict(cell) for name, cell in copy.copy(cells).items()}
