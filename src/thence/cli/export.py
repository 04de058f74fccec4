"""``thence export``."""

from __future__ import annotations

from pathlib import Path


def export_command(checkpoint: str, folder: Path, /, *, trust_remote_code: bool = False) -> int:
    """Make a Hugging Face folder from a checkpoint: weights, configuration, tokenizer.

    It takes checkpoints of one process and those that several ranks wrote in parts. Of a run it takes the last stage
    that has trained something: its model if the stage is finished, its newest checkpoint if it is not. No bit of a
    weight changes. It needs host memory for one copy of the weights, and no GPU.

    Examples:

      thence export runs/mine-seed0 mine-so-far
      thence export runs/mine-seed0:sft mine-sft
      thence export runs/mine-seed0:rl@40 mine-40

    Args:
        checkpoint: A run, RUN:STAGE, RUN:STAGE@STEP (with keep_every), or the folder of a checkpoint.
        folder: The folder to write. It must be empty or not there.
        trust_remote_code: Run Python code that the model ships.
    """
    from thence.cli.app import quiet_libraries
    from thence.train.export import check_free, export
    from thence.train.run_models import find_trained

    check_free(folder)
    quiet_libraries()
    found = find_trained(checkpoint)
    print(f"exports {found.words}", flush=True)
    made = export(found.folder, folder, trust_remote_code=trust_remote_code or found.trust_remote_code)
    print(f"{made.parameters:,} parameters ({', '.join(made.dtypes)}), {made.bytes / 1e9:.2f} GB: {folder}")
    return 0
