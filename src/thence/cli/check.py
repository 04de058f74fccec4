"""``thence check``: does thence do right by this model and these rows? Tried, not looked up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from thence.cli.app import quiet_libraries
from thence.errors import UserError
from thence.recipe import Data, Recipe, load_recipe, shipped_recipes

if TYPE_CHECKING:
    from rich.console import Console

PART_WIDTH = 26
MARKS = {"ok": ("✓", "green"), "refused": ("✗", "red"), "unverified": ("?", "yellow"), "unused": ("–", "yellow")}


@dataclass
class Checked:
    """What was tried, line by line, printed as soon as it is known."""

    console: Console
    refused: list[str] = field(default_factory=list)
    unverified: list[str] = field(default_factory=list)

    def attempt(self, part: str, act: Callable[[], str | None]) -> bool:
        """Try one thing. Returns whether it holds."""
        from thence.train.probe import NotVerified

        try:
            reason, state, remedy = act() or "", "ok", ""
        except NotVerified as missing:
            reason, state, remedy = str(missing), "unverified", ""
        except UserError as error:
            reason, state, remedy = str(error).split("\n  remedy:")[0], "refused", error.remedy
        self.line(part, state, reason, remedy)
        return state == "ok"

    def line(self, part: str, state: str, reason: str, remedy: str = "") -> None:
        """Print one verdict with its reason and remedy."""
        from rich.text import Text

        from thence.pages.terminal import facts

        mark, colour = MARKS[state]
        said = Text(reason)
        if remedy and state in ("refused", "unverified"):
            said.append(f"\nremedy: {remedy}", colour)
        row = (Text(mark, f"bold {colour}"), Text(part, "bold"), said)
        self.console.print(facts([row], widths=(1, PART_WIDTH), gap=1))
        if state == "refused":
            self.refused.append(part)
        if state == "unverified":
            self.unverified.append(part)


def check_command(
    model: Annotated[str, Parameter(completer=lambda _: [*shipped_recipes()])],
    /,
    *,
    data: Annotated[str | None, Parameter(metavar="FILE,FILE")] = None,
    overrides: Annotated[dict[str, Any], Parameter(parse=False)],
) -> int:
    """Try on the model itself what training relies on.

    The step's gradient against plain autograd, packed rows, sampling, saving and resuming, end tokens, and one example
    with the trained tokens marked. MODEL is a Hugging Face folder or hub name, a run, a GGUF file, world:chain/rich or
    package:NAME. It may be a recipe instead, shipped or a TOML file: then all that the recipe names is tried too. Any
    field of a recipe is a flag; `thence run --fields` lists them. Exit code 1: something does not hold.

    Examples:

      thence check ./my-model --data train.jsonl
      thence check mine.toml --data.template chat.jinja

    Args:
        model: What is tried: a model or a recipe.
        data: Rows to render: JSONL, Parquet or a hub name. Several: with commas between.
    """
    if data is not None:
        if "data.source" in overrides:
            problem = "the field is given twice, as --data and as --data.source"
            raise UserError(problem, remedy="give it once", field="--data")
        overrides["data.source"] = data.split(",") if "," in data and not data.startswith("[") else data
    from rich.text import Text

    from thence.terminal import make_console

    console = make_console()
    is_recipe = model in shipped_recipes() or model.endswith(".toml")
    recipe = load_recipe(model, overrides) if is_recipe else _recipe_of(model, overrides)
    checked = Checked(console)
    if is_recipe:
        _check_recipe(checked, recipe)
    _check_model(checked, recipe, with_data=is_recipe or "data.source" in overrides)
    if checked.refused:
        console.print(
            Text.assemble((f"\n{len(checked.refused)} do not hold:", "bold red"), " ", ", ".join(checked.refused))
        )
        return 1
    missing = f"; not verified: {', '.join(checked.unverified)}" if checked.unverified else ""
    console.print(Text.assemble(("\nall that was tried holds", "bold green"), missing))
    return 0


def _recipe_of(name: str, overrides: dict[str, Any]) -> Recipe:
    """A recipe that trains this model with SFT, for a model that was named alone."""
    from thence.evaluate.origin import find_model

    gguf_file = overrides.get("model.gguf_file", overrides.get("model.gguf-file"))
    settings, _ = find_model(name, None if gguf_file is None else str(gguf_file))
    tables = {"name": "check", "stages": ["sft"], "model": settings.model_dump(exclude_none=True)}
    return load_recipe(tables, overrides)


def _check_recipe(checked: Checked, recipe: Recipe) -> None:
    from thence.pipeline.preflight import preflight

    for finding in preflight(recipe, restart=True):
        checked.line(finding.part, finding.state, finding.reason, finding.remedy)


def _check_model(checked: Checked, recipe: Recipe, with_data: bool) -> None:
    import torch

    from thence.rollout.choice import choice_of
    from thence.train.lora import has_adapters
    from thence.train.model import load_model
    from thence.train.policy import Policy
    from thence.train.probe import check_adapters, check_files, check_gradient
    from thence.train.recompute import recompute
    from thence.train.weights import skeleton_of, whole

    quiet_libraries()
    found: list[Any] = []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def opened() -> str:
        found.append(load_model(recipe.model, device, recipe.seed))
        model = found[0].model
        count = sum(p.numel() for p in model.parameters())
        return f"{type(model).__name__}, {count:,} parameters; its logits are hidden states x output layer; causal"

    if not checked.attempt("model", opened):
        return
    loaded, settings = found[0], recipe.model
    model = loaded.model
    checked.attempt("tokens and embedding", lambda: _vocabulary(loaded))
    checked.attempt("end tokens", lambda: _ends(loaded, recipe))
    checked.attempt("context", lambda: _context(loaded, recipe, with_data))
    _check_example(checked, loaded, recipe, with_data)
    policy = Policy(model)
    if not _adapted(checked, policy, recipe):
        return

    def gradient(packing: bool) -> str:
        return check_adapters(policy, packing) if has_adapters(model) else check_gradient(model, packing)

    def of_plain(check: Callable[[Any], str]) -> str:
        with whole(policy) as plain:  # adapters merged
            return check(plain)

    checked.attempt("gradient, padded rows", lambda: gradient(False))
    _check_packing(checked, policy, recipe, gradient)
    again = [getattr(recipe.stage(name), "activation_checkpointing", False) for name in recipe.stages]
    for which in dict.fromkeys(each for each in again if each is not False):
        checked.attempt("activation checkpointing", lambda which=which: recompute(skeleton_of(model), which))
    checked.attempt("sampling", lambda: of_plain(lambda plain: _sampling(choice_of(plain))))
    trusted = settings.trust_remote_code
    checked.attempt("saving and resuming", lambda: of_plain(lambda it: check_files(it, loaded.tokenizer, trusted)))


def _adapted(checked: Checked, policy: Any, recipe: Recipe) -> bool:
    """Put the adapters that the recipe trains into the policy. Returns whether it can be."""
    from thence.train.adapted import adapt, lora_of

    name = next((name for name in recipe.stages if lora_of(recipe, name) is not None), None)
    if name is None:
        return True

    def put() -> str:
        adapt(policy, recipe, name)
        trained = sum(parameter.numel() for parameter in policy.trained())
        return f"{trained:,} parameters are trained, those under them are not"

    return checked.attempt("adapters", put)


def _check_packing(checked: Checked, policy: Any, recipe: Recipe, gradient: Callable[[bool], str]) -> None:
    """Packing is a choice: a model that cannot be packed is refused only where the recipe makes it."""
    from thence.models.packing import way_of

    asked = any(getattr(recipe.stage(name), "packing", False) for name in recipe.stages)
    try:
        way = way_of(policy.model)
    except UserError as error:
        state = "refused" if asked else "unused"
        checked.line("packed rows", state, f"{error.problem}" + ("" if asked else "; leave packing off"), error.remedy)
        return
    checked.line("packed rows", "ok", f"by {way}" + ("" if asked else "; not asked for"))
    if asked:
        checked.attempt("gradient, packed rows", lambda: gradient(True))


def _data(recipe: Recipe) -> Data:
    """The data of the first stage that trains, else of the first."""
    names = [*(name for name in recipe.stages if not name.startswith("eval")), *recipe.stages]
    return recipe.stage_data(recipe.stage(names[0]).data)


def _sampling(choice: Any) -> str:
    how = (
        "thence's decoder for the Llama family" if choice.decoder.__name__ == "LlamaDecoder" else "transformers' cache"
    )
    return f"{how}, log-probabilities as in a plain pass" + ("" if choice.pads else "; prompts of one length at a time")


def _vocabulary(loaded: Any) -> str:
    rows = loaded.model.get_input_embeddings().weight.shape[0]
    tokens = max(loaded.tokenizer.get_vocab().values()) + 1
    padding = f", {rows - tokens:,} more rows than tokens" if rows > tokens else ""
    return f"{tokens:,} tokens, {rows:,} rows{padding}"


def _ends(loaded: Any, recipe: Recipe) -> str:
    from thence.data.chat import end_token_ids

    ends = end_token_ids(loaded.tokenizer, _data(recipe).template, loaded.model)
    named = [f"{loaded.tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in ends]
    return f"{', '.join(named)}; the first is trained after every response"


def _context(loaded: Any, recipe: Recipe, with_data: bool) -> str:
    from thence.models.lengths import context_of
    from thence.pipeline.prompts import load_prompts

    limit = context_of(loaded.model.config)
    said = f"{limit:,} tokens" if limit else "the model tells no limit"
    if not with_data:
        return said
    prompts = load_prompts(_data(recipe), loaded.tokenizer)
    longest = max(len(p.token_ids) + len(p.demonstration_ids or ()) for p in prompts)
    if limit and longest > limit:
        raise UserError(
            f"the longest of {len(prompts):,} rows has {longest:,} tokens, the model's context {limit:,}",
            remedy=f"set --data.max-prompt-tokens and --data.max-response-tokens to {limit} together, or less",
            field="data",
        )
    return f"{said}; the longest of {len(prompts):,} rows has {longest:,}"


def _check_example(checked: Checked, loaded: Any, recipe: Recipe, with_data: bool) -> None:
    """Print one rendered example with what is trained, and what can be said about it."""
    from rich.panel import Panel

    from thence.data.chat import chat_format, end_token_ids, render
    from thence.data.example import Example, Message
    from thence.data.show import checks, segments, terminal_text
    from thence.pipeline.prompts import first_example
    from thence.terminal import make_console

    data, tokenizer = _data(recipe), loaded.tokenizer
    example = Example(messages=(Message("user", "How much is 2 + 3?"),), demonstration="2 + 3 = 5", source="an example")
    held: list[Any] = []

    def rendered() -> str:
        chosen = first_example(data) if with_data else example
        chat = chat_format(tokenizer, data.template, data.template_variables)
        row = render(chosen, tokenizer, system=data.system, template=chat)
        held.extend((chosen, chat, row))
        return f"{chosen.source}: {len(row.prompt_ids)} prompt and {len(row.response_ids or ())} trained tokens"

    if not checked.attempt("example", rendered):
        return
    chosen, chat, row = held
    ends = end_token_ids(tokenizer, chat, loaded.model)
    title = "context dim, [bold green]trained green[/], special tokens reversed"
    make_console(verbatim=True).print(Panel(terminal_text(segments(row, tokenizer)), title=title, title_align="left"))
    for one in checks(chosen, row, tokenizer, chat, system=data.system, stop_ids=ends):
        state = {True: "ok", False: "refused", None: "unverified"}[one.ok]
        checked.line(one.name, state, one.reason, one.remedy)
