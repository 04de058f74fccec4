"""``thence export``."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from thence import __version__
from thence.errors import UserError

GgufType = Literal["f32", "f16", "bf16", "q8_0"]


def export_command(
    checkpoint: str,
    folder: Path,
    /,
    *,
    gguf: GgufType | None = None,
    merge: bool = False,
    push_to_hub: str | None = None,
    public: bool = False,
    dry_run: bool = False,
    trust_remote_code: bool = False,
) -> int:
    """Make a Hugging Face folder from a checkpoint: weights, configuration, tokenizer. With --gguf, one GGUF file.

    It takes checkpoints of one process and those that several ranks wrote in parts. Of a run it takes the last stage
    that has trained something: its model if the stage is finished, its newest checkpoint if it is not. No bit of a
    weight changes. It needs host memory for one copy of the weights, and no GPU.

    The folder of a run's model gets a model card, README.md: data, recipe, FLOPs and evaluations from the run's files.
    A GGUF file, for llama.cpp and others, is read back and compared with the model. Llama and Qwen2 are written.
    Nothing is sent anywhere without --push-to-hub, which needs `hf auth login` or HF_TOKEN.

    Examples:

      thence export runs/mine-seed0 mine-so-far
      thence export runs/mine-seed0:sft mine-sft
      thence export runs/mine-seed0:rl@40 mine-40
      thence export runs/mine-seed0 mine.gguf --gguf q8_0
      thence export runs/mine-seed0 mine --push-to-hub me/mine --dry-run

    Args:
        checkpoint: A run, RUN:STAGE, RUN:STAGE@STEP (with keep_every), or the folder of a checkpoint or model.
        folder: The folder to write, empty or not there; with --gguf the file.
        gguf: Write a GGUF file with numbers of this type.
        merge: Merge the adapters (LoRA) into their model, as `thence merge` does.
        push_to_hub: Send it to this repository of the Hugging Face hub, OWNER/NAME; a new one is private.
        public: A new repository is public, and one that is public may be written to.
        dry_run: With --push-to-hub, write and list what would be sent, and send nothing.
        trust_remote_code: Run Python code that the model ships.
    """
    if push_to_hub is None and (public or dry_run):
        flag = "--public" if public else "--dry-run"
        raise UserError("there is nothing to send", remedy="add --push-to-hub OWNER/NAME", field=flag)
    if push_to_hub is not None:
        from thence.train.hub import check_repository

        check_repository(push_to_hub)
    place = folder.expanduser()
    if gguf is None:
        _to_folder(checkpoint, folder, merge, trust_remote_code)
        if push_to_hub is not None:
            # the manifest is thence's own
            paths = [path for path in sorted(place.rglob("*")) if path.is_file() and path.name != "manifest.json"]
            files = {path.relative_to(place).as_posix(): path for path in paths}
            _send(push_to_hub, files, place, public, dry_run)
        return 0
    if folder.suffix != ".gguf":
        raise UserError("the name of a GGUF file ends in .gguf", remedy=f"write {folder}.gguf", field="--gguf")
    if place.exists():
        raise UserError("the file is there already", remedy="give another name", file=folder)
    above = place.absolute().parent
    above.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".thence-gguf-", dir=above) as temporary:
        card = Path(temporary) / "README.md"
        _to_gguf(checkpoint, folder, gguf, merge, trust_remote_code, card)
        if push_to_hub is not None:
            files = {place.name: place, **({card.name: card} if card.is_file() else {})}
            _send(push_to_hub, files, place, public, dry_run)
    return 0


def _to_gguf(checkpoint: str, file: Path, kind: GgufType, merge: bool, trust_remote_code: bool, card: Path) -> None:
    from thence.pages.card import write_card
    from thence.train.export import measured_model
    from thence.train.gguf_export import write_gguf

    source = card.parent / file.stem
    weights = _to_folder(checkpoint, source, merge, trust_remote_code, tell=False)
    try:
        made = write_gguf(source, file.expanduser(), kind)
    except UserError as error:
        if error.file != str(source):
            raise
        # the folder in between is gone when the user reads this
        raise UserError(error.problem, remedy=error.remedy, file=weights) from error
    write_card(weights, card, measured_model(source, file).parameters, f"{kind}, one GGUF file", "gguf")
    print(f"read back: {made.tensors} tensors as written, the same tokens, logits within {made.largest:.1g}")
    print(f"{kind}, {made.bytes / 1e9:.2f} GB: {file}")


def _to_folder(checkpoint: str, folder: Path, merge: bool, trust_remote_code: bool, *, tell: bool = True) -> Path:
    """Write the folder. Returns where its weights come from."""
    from thence.cli.app import quiet_libraries
    from thence.cli.merge import merge_into
    from thence.pages.card import write_card
    from thence.train.export import check_free, export
    from thence.train.run_models import find_trained

    found = find_trained(checkpoint)
    if merge:
        merge_into(checkpoint, folder, None, trust_remote_code)
        if tell:
            print(f"written: {folder}")
        return found.folder
    check_free(folder)
    quiet_libraries()
    print(f"exports {found.words}", flush=True)
    made = export(found.folder, folder, trust_remote_code=trust_remote_code or found.trust_remote_code)
    card = folder.expanduser() / "README.md"
    with_card = write_card(found.folder, card, made.parameters, ", ".join(made.dtypes))
    if tell:
        print(f"{made.parameters:,} parameters ({', '.join(made.dtypes)}), {made.bytes / 1e9:.2f} GB: {folder}")
        if with_card:
            print(f"model card: {card}")
    return found.folder


def _send(repository: str, files: Mapping[str, Path], exported: Path, public: bool, dry_run: bool) -> None:
    from thence.train.hub import CARD, push

    seen = "public" if public else "private"
    print(f"{'would send' if dry_run else 'sends'} to {repository} (a new repository is {seen}):")
    for name, path in files.items():
        print(f"  {path.stat().st_size:>14,} bytes  {name}")
    if dry_run:
        print("nothing was sent")
        return
    message = f"Model exported by thence {__version__}"
    address, stays = push(repository, files, exported=exported, public=public, message=message)
    if stays:
        print(f"the {CARD} of the repository was there, and stays as it was")
    print(f"sent: {address}")
