"""Run cases of an adapter in the audited stack's own Python: `python child.py job.json`.

This file runs where thence is not installed. It needs the standard library, torch and safetensors, no more.

For every case it writes a folder: `rank-R/step-K.safetensors` (the parameters after K optimizer steps, float32 or as
they are), and `rank-R/record.json` (rows that went forward, what the adapter said, how it ended). A case that starts
again from a checkpoint has `resumed-K.safetensors` too, and one that saves or evaluates `saved.safetensors`.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import sys
import time
import traceback
import types
import zlib
from pathlib import Path


class SkipCase(Exception):
    """The stack lacks what the case asks for."""


class StopCase(Exception):
    """Enough optimizer steps were taken; ends the stack's own loop."""


class Session:
    """What an adapter gets beside the case: where the probe is, and where to put what it sees.

    Attributes:
        case: the case as a plain dict (fields of thence.audit.result.Case).
        model: folder of the probe's model and tokenizer in the Hugging Face layout, float32.
        rank, ranks: this process among the data-parallel ones.
        scratch: an empty folder for whatever the stack writes, removed afterwards.
    """

    def __init__(self, case: dict, job: dict, out: Path):
        self.case = case
        self.model = job["model"]
        self.rank = int(os.environ.get("RANK", "0"))
        self.ranks = int(os.environ.get("WORLD_SIZE", "1"))
        self.folder = out / f"rank-{self.rank}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.scratch = str(out / f"scratch-{self.rank}")
        Path(self.scratch).mkdir(exist_ok=True)
        self._data = job["data"]
        self.record: dict = {"forwards": [], "said": {}, "frozen": [], "steps": 0, "status": "running"}
        self.record["trained_mode"] = False  # whether a module was in training mode while it was evaluated
        self._handles: list = []
        self._run = "step"

    def data(self, layout: str) -> str:
        """Path of the probe's data: ``rows`` (input_ids, labels), ``messages``, ``prompt-completion`` (text with the
        chat template already applied), ``chat-prompt-completion`` (lists of messages) or ``alpaca`` (instruction,
        output; a JSON list). Cut to the number of examples of the case. Raises KeyError for another layout."""
        source = Path(self._data[layout])
        cut = self.folder / f"data-{layout}{source.suffix}"
        if not cut.exists():
            write_first(source, cut, self.case["examples"])
        return str(cut)

    def rows(self, layout: str = "rows") -> list[dict]:
        """The examples of the case in a layout of :meth:`data` that has one a line, by default dicts of ``input_ids``
        and ``labels`` (-100: not trained), lists of int."""
        return [json.loads(line) for line in Path(self.data(layout)).read_text(encoding="utf-8").splitlines()]

    def watch(self, model) -> None:
        """Note the inputs of every forward pass of ``model`` that builds a graph, and of the others while a case
        evaluates. Call it once, on the module whose forward gets ``input_ids``."""
        import torch

        def before(module, args, kwargs):
            if not torch.is_grad_enabled() and self._run != "evaluation":
                return
            self.record["trained_mode"] |= self._run == "evaluation" and module.training
            names = ("input_ids", "attention_mask", "position_ids")
            seen = dict(zip(names, args, strict=False)) | kwargs
            self.forward(seen.get("input_ids"), seen.get("attention_mask"), seen.get("position_ids"))

        self._handles.append(model.register_forward_pre_hook(before, with_kwargs=True))

    def forward(self, input_ids, attention_mask=None, position_ids=None) -> None:
        """Note one forward pass by hand: tensors or lists of shape (rows, tokens)."""

        def plain(value):
            if value is None:
                return None
            value = value.tolist() if hasattr(value, "tolist") else value
            return value if value and isinstance(value[0], list) else [value]

        mask = plain(attention_mask)
        whole = mask is not None and isinstance(mask[0][0], list)
        mask = None if whole else mask
        entry = {"step": self.record["steps"], "input_ids": plain(input_ids), "attention_mask": mask}
        entry["position_ids"] = plain(position_ids)
        entry |= {"run": self._run, "whole_mask": whole}
        self.record["forwards"].append(entry)

    def parameters(self, named_tensors) -> None:
        """Keep the parameters after an optimizer step: a model, or pairs of name and full tensor. The first call of a
        case is for the parameters before the first step."""
        import torch
        from safetensors.torch import save_file

        if hasattr(named_tensors, "named_parameters"):
            still = [clean_name(n) for n, p in named_tensors.named_parameters() if not p.requires_grad]
            self.record["frozen"] = still
            named_tensors = named_tensors.named_parameters()
        state = {}
        for name, tensor in named_tensors:
            state[clean_name(name)] = torch.as_tensor(tensor).detach().to("cpu").contiguous().clone()
        save_file(state, str(self.folder / f"{self._run}-{self.record['steps']}.safetensors"))

    def stepped(self, named_tensors) -> bool:
        """Count an optimizer step and keep the parameters after it. Returns whether the case has had its steps."""
        self.record["steps"] += 1
        self.parameters(named_tensors)
        return self.done

    @property
    def done(self) -> bool:
        """Whether the case has had its steps."""
        return self.record["steps"] >= self.case["steps"]

    def restart(self) -> None:
        """Begin the second run of a case that resumes, which starts from what was saved after ``save_after`` steps of
        the first. Build everything anew, load it, and call :meth:`parameters` before the next step."""
        self.unwatch()
        seed_everything(1)  # a new process has nothing left of the first one's random state
        self._run, self.record["steps"] = "resumed", self.case["save_after"]

    def saved(self, saved) -> None:
        """Keep what the stack saved after the last step: a folder or file (safetensors, or torch's own), or pairs of
        name and whole tensor. Every rank may call it; the first rank's is judged."""
        from safetensors.torch import save_file

        pairs = read_saved(Path(saved)) if isinstance(saved, str | os.PathLike) else dict(saved)
        state = {clean_name(name): tensor.detach().to("cpu").clone().contiguous() for name, tensor in pairs.items()}
        save_file(state, str(self.folder / "saved.safetensors"))

    def evaluation(self) -> None:
        """Begin the trainer's own evaluation: from here on every forward pass is noted."""
        self._run = "evaluation"

    def evaluated(self, loss: float) -> None:
        """Keep the loss that the evaluation reports, nats."""
        self.record["loss"] = float(loss)
        self._run = "step"

    def stop(self):
        """Leave the stack's loop. Raises StopCase."""
        raise StopCase

    def say(self, **facts) -> None:
        """Keep facts for the judge: ``lr`` where it differs from the case, ``advantages`` (one an example, none zero),
        ``longest`` (the constant of a constant divisor, tokens); others, such as ``note``, are kept for the reader."""
        self.record["said"].update(facts)

    def skip(self, reason: str):
        """Leave this case out, by name. Raises SkipCase."""
        raise SkipCase(reason)

    def unwatch(self) -> None:
        """End the watching."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def close(self) -> None:
        """Write the record, and end the watching."""
        self.unwatch()
        path = self.folder / "record.json"
        path.write_text(json.dumps(self.record), encoding="utf-8")


def write_first(source: Path, target: Path, examples: int) -> None:
    """Write the first examples of a data file, a JSON list or JSONL, into another."""
    text = source.read_text(encoding="utf-8")
    if source.suffix == ".json":
        text = json.dumps(json.loads(text)[:examples])
    else:
        text = "\n".join(text.splitlines()[:examples]) + "\n"
    target.write_text(text, encoding="utf-8")


def read_saved(path: Path) -> dict:
    """All tensors of a file or of a model's folder. Raises FileNotFoundError if there are none."""
    import torch
    from safetensors.torch import load_file

    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        files = sorted(path.glob("*model*.bin")) or sorted(path.glob("*.pt"))
    if not files:
        raise FileNotFoundError(f"nothing was saved in {path}")
    state: dict = {}
    for file in files:
        if file.suffix == ".safetensors":
            state |= load_file(str(file))
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
            state |= {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
    return state


def seed_everything(seed: int) -> None:
    """Seed the random numbers of Python, torch and, where it is loaded, numpy."""
    import random

    import torch

    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


def clean_name(name: str) -> str:
    """A parameter's name in the Hugging Face layout, without what wrappers put before or into it."""
    for noise in ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        name = name.replace(noise, "")
    while name.startswith("module."):
        name = name[len("module.") :]
    return name


def load_adapter(path: str):
    """Import an adapter from its file, as part of a package of its folder, so that it can import the files beside it.

    Raises:
        ImportError: it is not a Python file.
    """
    file = Path(path).resolve()
    package = types.ModuleType(f"audited_{zlib.crc32(os.fsencode(file.parent)):08x}")
    package.__path__ = [str(file.parent)]
    sys.modules.setdefault(package.__name__, package)
    spec = importlib.util.spec_from_file_location(f"{package.__name__}.{file.stem.replace('.', '_')}", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def versions(packages) -> dict[str, str]:
    """Installed versions of some distributions; those that are not installed are left out."""
    import importlib.metadata
    import platform

    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def run_case(adapter, case: dict, job: dict) -> None:
    """Run one case and write its record, whatever happens."""
    out = Path(job["out"]) / case["folder"]
    session = Session(case, job, out)
    start = time.monotonic()
    seed_everything(0)
    try:
        adapter.run(case, session)
        session.record["status"] = "done"
    except StopCase:
        session.record["status"] = "done"
    except SkipCase as reason:
        session.record |= {"status": "skipped", "reason": str(reason)}
    except Exception as error:
        session.record |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
        session.record["traceback"] = traceback.format_exc()
    session.record["seconds"] = time.monotonic() - start
    session.close()
    gc.collect()


def wait_for_cases(path: Path) -> dict:
    """The job with its cases. The parent may start this process before it has them, so that both import meanwhile."""
    parent = os.getppid()
    while "cases" not in (job := json.loads(path.read_text(encoding="utf-8"))):
        if os.getppid() != parent:
            sys.exit("the process that was to give the cases has ended")
        time.sleep(0.02)
    return job


def main() -> None:
    """Run the cases of the job file that the command line names."""
    path = Path(sys.argv[1]).absolute()
    job = json.loads(path.read_text(encoding="utf-8"))
    start = time.monotonic()
    adapter = load_adapter(job["adapter"])
    ready = Path(job["out"]) / f"ready-{os.environ.get('RANK', '0')}.json"
    if hasattr(adapter, "prepare"):
        adapter.prepare()
    import torch

    torch.set_num_threads(1)
    facts = {"versions": versions(adapter.PACKAGES), "import_seconds": time.monotonic() - start}
    ready.write_text(json.dumps(facts), encoding="utf-8")
    job = wait_for_cases(path)
    for case in job["cases"]:
        run_case(adapter, case, job)


if __name__ == "__main__":
    main()
