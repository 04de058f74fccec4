"""Audit real trainers and write docs/audit-table.md from what came out.

    .venv/bin/python benchmarks/audit_targets/run.py ENVIRONMENTS [--only PART] [--table-only]

ENVIRONMENTS is the folder that environments.sh filled. Every audit's JSON goes to benchmarks/results/audit/; the table
is written from those files, so one target can be run again alone. A target whose environment is missing keeps its last
result, or gets a row that says so.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "audit"
TABLE = ROOT / "docs" / "audit-table.md"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("environments", type=Path)
    parser.add_argument("--only", action="append", default=[], help="targets with this in their name")
    parser.add_argument("--table-only", action="store_true", help="write the table from the results there are")
    args = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    targets = tomllib.loads((HERE / "targets.toml").read_text(encoding="utf-8"))["target"]
    for target in targets:
        if not args.table_only and (not args.only or any(part in target["name"] for part in args.only)):
            audit(target, args.environments)
    TABLE.write_text(table(targets), encoding="utf-8")


def audit(target: dict[str, str], environments: Path) -> None:
    """Run one audit; its report replaces the one before."""
    python = environments / target["environment"] / "bin" / "python" if target["environment"] else Path(sys.executable)
    out = result_of(target)
    if not python.exists():
        print(f"{target['name']}: no {python}", flush=True)
        return
    words = [sys.executable, "-m", "thence", "audit"]
    if "adapter" in target:
        words += [target["adapter"], "--all", *(["--python", str(python)] if target["environment"] else [])]
        words += ["--json", str(out), "--quiet"]
    else:
        here = HERE.relative_to(ROOT)
        command = target["command"].replace("{python}", str(python)).replace("{here}", str(here))
        command = command.replace("{bin}", str(python.parent))
        words += ["command", "--layout", target["layout"], "--json", str(out), "--quiet", "--time-limit", "240"]
        words += ["--", *shlex.split(command)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    print(f"{target['name']}: exit {done.returncode} {done.stderr.strip()[-300:]}", flush=True)
    if done.returncode in (0, 1, 2) and out.exists():
        shorten(out, environments, {} if "adapter" in target else versions_in(python))


def versions_in(python: Path) -> dict[str, str]:
    """What a program was run with."""
    code = (
        "import importlib.metadata as m, json\n"
        "names = {d.metadata['Name'] for d in m.distributions()} & {'torch', 'transformers', 'trl', 'accelerate'}\n"
        "print(json.dumps({n: m.version(n) for n in sorted(names)}))"
    )
    return json.loads(subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout)


def shorten(path: Path, environments: Path, versions: dict[str, str]) -> None:
    """Leave out the single tokens, and the machine's folders."""
    text = path.read_text(encoding="utf-8").replace(f"{environments}/", "ENVIRONMENTS/")
    report = json.loads(text.replace(str(ROOT) + "/", ""))
    report["command"] = re.sub(r"\S*/bin/python(?= -m)", "python", report["command"])
    report["versions"] |= versions
    for case in report["cases"]:
        for step in case["steps"]:
            for sequence in step["sequences"]:
                del sequence["tokens"]
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def result_of(target: dict[str, str]) -> Path:
    return RESULTS / (re.sub(r"[^a-z0-9.]+", "-", target["name"].lower()).strip("-") + ".json")


def table(targets: list[dict[str, str]]) -> str:
    """The whole page."""
    lines = [
        "# Real trainers under audit",
        "",
        "Written by `benchmarks/audit_targets/run.py` from real optimizer steps on a CPU; every report is kept under",
        "`benchmarks/results/audit/`. Environments: `benchmarks/audit_targets/environments.sh`. Seconds are those of a",
        "shared machine with two cores, imports included.",
        "",
        "Adapters run with `--all`, that is with settings that nobody has by default too. The findings of current",
        "transformers (averaging over ranks switched off) and TRL SFT (packing `wrapped`, loss `dft`) come from those;",
        "those of DeepSpeed 0.19 from loops that never set the accumulation boundary; that of accelerate from the loop",
        "that its documentation shows first; those of PyTorch FSDP2 from loops written as tutorials and users write",
        "them, beside loops that are right. That of TRL GRPO is a default: with `beta` its KL is multiplied by the",
        "differentiated ratio (`use_bias_correction_kl`), where GRPO's own k3 is asked. Those of axolotl's plain cases",
        "and of ms-swift with label smoothing are faults of the stack; the others of both, and that of SkyRL",
        "(`token_mean_legacy`), are options that say what they do. Of verl, OpenRLHF and SkyRL the losses of RL",
        "were driven in a loop of the adapter, not their trainers. Rows with * were measured with an earlier probe, of",
        "other lengths.",
        "",
        "| trainer | versions | cases judged | verdict | what was found (cases) | token weight over ideal | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    details: list[str] = []
    for target in targets:
        path = result_of(target)
        if not path.exists():
            lines.append(f"| {target['name']} | | 0 | not run | its environment was not there | | |")
            continue
        report = json.loads(path.read_text(encoding="utf-8"))
        lines.append(row(target["name"], report))
        details += detail(target["name"], report)
    return "\n".join([*lines, "", *details]) + "\n"


def row(name: str, report: dict[str, Any]) -> str:
    from thence.audit.judge.findings import CATALOGUE
    from thence.audit.solve.probe import LENGTHS

    judged = [case for case in report["cases"] if case["status"] == "judged"]
    steps = [step for case in judged for step in case["steps"]]
    found: dict[str, int] = {}
    for case in judged:
        ids = {
            f["id"]
            for f in [*case["findings"], *(f for s in case["steps"] for f in s["findings"])]
            if f["kind"] == "fault"
        }
        for each in ids:
            found[each] = found.get(each, 0) + 1
    ordered = sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))
    said = ", ".join(f"{CATALOGUE[i].title} ({n})" for i, n in ordered)
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items() if k not in ("python", "program"))
    low = min((s["smallest"] for s in steps), default=0.0)
    high = max((s["largest"] for s in steps), default=0.0)
    count = f"{len(judged)} of {len(report['cases'])}"
    weights = f"{max(low, 0) if abs(low) < 1e-3 else low:.2f} to {high:.2f}"
    verdict = report["verdict"]["outcome"]
    # Figures depend on the lengths of the responses, so a row of another probe cannot be compared with the rest.
    name += "" if report["probe"].get("trained tokens") == sum(LENGTHS) else " *"
    return f"| {name} | {versions} | {count} | {verdict} | {said or 'nothing'} | {weights} | {report['seconds']:.0f} |"


def detail(name: str, report: dict[str, Any]) -> list[str]:
    """Every case of a target with a finding, and those that were not judged, with the reason."""
    lines = [f"## {name}", "", f"`{report['command']}`", ""]
    lines += [f"{sentence}" for sentence in report["verdict"]["sentences"]] + [""]
    rows = []
    for case in report["cases"]:
        if case["status"] != "judged":
            rows.append(f"| {case['case']['name']} | {case['status']}: {case['reason'].replace('|', '/')} | |")
            continue
        weights = " ".join(f"{sequence['weight']:.2f}" for step in case["steps"][:1] for sequence in step["sequences"])
        every = [*case["findings"], *(f for step in case["steps"] for f in step["findings"])]
        faults = "; ".join(dict.fromkeys(f["detail"] for f in every if f["kind"] == "fault")) or "as asked"
        rows.append(f"| {case['case']['name']} | {faults} | {weights} |")
    return [*lines, "| case | what was found | weight of each row over ideal, first step |", "|---|---|---|", *rows, ""]


if __name__ == "__main__":
    main()
