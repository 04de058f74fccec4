"""``thence merge``."""

from __future__ import annotations

from pathlib import Path


def merge_command(adapter: str, folder: Path, /, *, base: str | None = None, trust_remote_code: bool = False) -> int:
    """Merge a LoRA adapter into its model: a plain Hugging Face folder.

    It takes the folder of an adapter, as peft writes it, or a run that trains adapters: of the last training stage that
    has begun the finished model, or what its newest checkpoint holds, merged. The weights are written in float32. The
    folder of a run's model gets a model card.

    Examples:

      thence merge some/adapter merged --base Qwen/Qwen2.5-0.5B
      thence merge runs/mine-seed0:sft merged
      thence merge runs/mine-seed0:sft@40 merged

    Args:
        adapter: The folder of an adapter, a run, RUN:STAGE, or RUN:STAGE@STEP.
        folder: The folder to write. It must be empty or not there.
        base: The model that the adapter belongs to. Default: the one that the adapter names.
        trust_remote_code: Run Python code that the model ships.
    """
    merge_into(adapter, folder, base, trust_remote_code)
    print(f"written: {folder}")
    return 0


def merge_into(adapter: str, folder: Path, base: str | None, trust_remote_code: bool) -> None:
    """Write the merged model, and its card where it is one of a run. Raises UserError."""
    from thence.cli.app import quiet_libraries
    from thence.pages.card import write_card
    from thence.train.adapted import merge_checkpoint
    from thence.train.export import check_free, export, measured_model
    from thence.train.merge import is_adapter, merge
    from thence.train.run_models import find_trained

    check_free(folder)
    quiet_libraries()
    if is_adapter(Path(adapter).expanduser()):
        merge(Path(adapter).expanduser(), folder, base, trust_remote_code=trust_remote_code)
    else:
        found = find_trained(adapter)
        print(f"merges {found.words}", flush=True)
        if (found.folder / "state.json").is_file():
            merge_checkpoint(found.folder, folder)
        else:
            export(found.folder, folder, trust_remote_code=trust_remote_code or found.trust_remote_code)
        made = measured_model(folder.expanduser(), folder)
        write_card(found.folder, folder.expanduser() / "README.md", made.parameters, ", ".join(made.dtypes))
