"""``thence sample``: look at what a model of a run says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from thence.cli.flags import split_flags
from thence.cli.report import existing_run
from thence.errors import UserError
from thence.pipeline.folder import read_jsonl

HELP = """\
thence sample RUN [--stage NAME] [--n 5] [--verdict right|wrong|unknown]

Print prompts with the model's responses and verdicts, from what the run kept."""
COLOURS = {"right": "green", "wrong": "red", "unknown": "yellow"}
OPTIONS = ("--stage", "--n", "--verdict")


def sample_command(argv: Sequence[str]) -> int:
    """Print kept samples of a run's stages."""
    if "--help" in argv or "-h" in argv:
        print(HELP)
        return 0
    rest, chosen = list(argv), {}
    for option in OPTIONS:
        if option in rest:
            at = rest.index(option)
            if at + 1 == len(rest):
                raise UserError(f"{option} needs a value", remedy=HELP.splitlines()[0])
            chosen[option] = rest.pop(at + 1)
            rest.pop(at)
    positional, _, _ = split_flags(rest, ())
    if len(positional) != 1 or not chosen.get("--n", "5").isdigit():
        raise UserError("thence sample takes one run", remedy=HELP.splitlines()[0])
    folder = existing_run(positional[0])
    stages = _stages_with_samples(folder, chosen.get("--stage"))
    console = Console()
    shown = 0
    for stage in stages:
        lines = read_jsonl(folder / "stages" / stage / "samples.jsonl")
        lines = [line for line in lines if chosen.get("--verdict") in (None, line["verdict"])]
        # spread over the file, so that every split and temperature has its turn
        n = int(chosen.get("--n", "5"))
        for line in lines[:: max(1, len(lines) // max(1, n))][:n]:
            _show(console, stage, line)
            shown += 1
    if not shown:
        raise UserError("no such samples", remedy="leave out --verdict or --stage", file=folder)
    return 0


def _stages_with_samples(folder: Path, wanted: str | None) -> list[str]:
    found = [path.parent.name for path in sorted(folder.glob("stages/*/samples.jsonl"))]
    if wanted is not None and wanted not in found:
        raise UserError(
            f"stage {wanted!r} has no samples",
            remedy=f"stages with samples: {', '.join(found) or 'none yet'}",
            file=folder,
        )
    return [wanted] if wanted is not None else found


def _show(console: Console, stage: str, line: dict) -> None:
    verdict = line["verdict"]
    head = Text.assemble(
        (f" {verdict} ", f"bold white on {COLOURS.get(verdict, 'grey50')}"),
        (f"  {stage}", "bold"),
        f"  {line.get('split') or 'step ' + str(line['step'])}",
        f"  T={line['temperature']}" if line.get("temperature") is not None else "",
        f"  {line['tokens']} tokens" + (", cut" if line["finish"] == "length" else ""),
    )
    console.print(head)
    console.print(Text("  prompt    ", "dim") + Text(line["prompt"]))
    console.print(Text("  response  ", "dim") + Text(line["response"]))
    if line["answer"] is not None:
        found = f"   found {line['extracted']}" if line.get("extracted") is not None else ""
        console.print(Text("  answer    ", "dim") + Text(line["answer"] + found))
    if line.get("reason"):
        console.print(Text("  reason    ", "dim") + Text(line["reason"]))
    console.print()
