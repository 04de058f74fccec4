"""``thence export``."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal

from thence.errors import UserError


def export_command(
    checkpoint: str,
    folder: Path,
    /,
    *,
    gguf: Literal["f32", "f16", "bf16", "q8_0"] | None = None,
    merge: bool = False,
    trust_remote_code: bool = False,
) -> int:
    """Make a Hugging Face folder from a checkpoint: weights, configuration, tokenizer. With --gguf, one GGUF file.

    It takes checkpoints of one process and those that several ranks wrote in parts. Of a run it takes the last stage
    that has trained something: its model if the stage is finished, its newest checkpoint if it is not. No bit of a
    weight changes. It needs host memory for one copy of the weights, and no GPU.

    A GGUF file, for llama.cpp and others, is read back and compared with the model. Llama and Qwen2 are written.

    Examples:

      thence export runs/mine-seed0 mine-so-far
      thence export runs/mine-seed0:sft mine-sft
      thence export runs/mine-seed0:rl@40 mine-40
      thence export runs/mine-seed0 mine.gguf --gguf q8_0

    Args:
        checkpoint: A run, RUN:STAGE, RUN:STAGE@STEP (with keep_every), or the folder of a checkpoint or model.
        folder: The folder to write, empty or not there; with --gguf the file.
        gguf: Write a GGUF file with numbers of this type.
        merge: Merge the adapters (LoRA) into their model, as `thence merge` does.
        trust_remote_code: Run Python code that the model ships.
    """
    if gguf is None:
        return _to_folder(checkpoint, folder, merge, trust_remote_code)
    from thence.train.gguf_export import write_gguf

    if folder.suffix != ".gguf":
        raise UserError("the name of a GGUF file ends in .gguf", remedy=f"write {folder}.gguf", field="--gguf")
    if folder.exists():
        raise UserError("the file is there already", remedy="give another name", file=folder)
    place = folder.expanduser().absolute().parent
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".thence-gguf-", dir=place) as temporary:
        source = Path(temporary) / folder.stem
        _to_folder(checkpoint, source, merge, trust_remote_code, tell=False)
        made = write_gguf(source, folder.expanduser(), gguf)
    print(f"read back: {made.tensors} tensors as written, the same tokens, logits within {made.largest:.1g}")
    print(f"{gguf}, {made.bytes / 1e9:.2f} GB: {folder}")
    return 0


def _to_folder(checkpoint: str, folder: Path, merge: bool, trust_remote_code: bool, *, tell: bool = True) -> int:
    from thence.cli.app import quiet_libraries
    from thence.cli.merge import merge_command
    from thence.train.export import check_free, export
    from thence.train.run_models import find_trained

    if merge:
        return merge_command(checkpoint, folder, trust_remote_code=trust_remote_code)
    check_free(folder)
    quiet_libraries()
    found = find_trained(checkpoint)
    print(f"exports {found.words}", flush=True)
    made = export(found.folder, folder, trust_remote_code=trust_remote_code or found.trust_remote_code)
    if tell:
        print(f"{made.parameters:,} parameters ({', '.join(made.dtypes)}), {made.bytes / 1e9:.2f} GB: {folder}")
    return 0
