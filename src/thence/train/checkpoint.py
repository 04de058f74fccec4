"""Checkpoints that are whole or not there: written beside, checked by checksum, renamed into place.

A checkpoint is a folder with the optimizer's tensors and the plain state beside the weights. transformers opens it,
unless the weights are cut over ranks: each rank then writes its part, and ``thence export`` puts them together. Of a
model with adapters it holds what is trained, and no more: megabytes.
The weights have the names that they have in memory, which are not the published ones for some architectures (experts
of a mixture lie together in memory). safetensors and JSON only; nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from thence.files import flush, to_json
from thence.train.lora import has_adapters, trained_tensors
from thence.train.parallel import Ranks, on_first_rank, together
from thence.train.state import on_host, optimizer_tensors, write_parts
from thence.train.weights import fill, named_parts, skeleton_of

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
REPLACED, WRITING = ".replaced-", ".writing-"
KEPT = "kept"
"""In ``state.json`` of a checkpoint that newer ones do not replace."""
BEST = "best"
"""In ``state.json`` of a checkpoint that newer ones do not replace, unless they have this mark too."""
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NAMED = re.compile(
    r"(model|shard-).*\.safetensors|optimizer\.safetensors|.*\.(json|jinja|py|model|tiktoken)|(vocab|merges|special_tokens).*"
)
"""What the files of a model and a checkpoint are called, for a folder whose manifest cannot be read."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk. :mod:`thence.train.state` reads its weights and the optimizer's tensors from ``folder``."""

    folder: Path
    step: int
    plain: dict[str, Any]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The optimizer's tensors, whole, by ``kind/parameter/field``; read anew each time."""
        return optimizer_tensors(self.folder)


def write_checkpoint(
    folder: Path,
    step: int,
    model: Any,
    tokenizer: Any,
    plain: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    keep: int = 1,
) -> Path:
    """Write ``folder/step-NNNNNN`` atomically and remove all but the ``keep`` newest, those marked KEPT and the best.

    Killed at any moment, the folder holds the earlier checkpoint, the new one, or both; never a part of one.
    """
    return begin_checkpoint(folder, step, model, tokenizer, plain, tensors, keep=keep)()


def begin_checkpoint(
    folder: Path,
    step: int,
    model: Any,
    tokenizer: Any,
    plain: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    keep: int = 1,
) -> Callable[[], Path]:
    """The same in two parts: what the training goes on to use is read now, the rest by what is returned.

    Args:
        model, tensors: for a thread, those of :func:`host_copy` and :func:`thence.train.state.on_host`.
    """
    final, temporary = _places(folder, step)
    with removed_on_failure(temporary):
        temporary.mkdir(parents=True)
        _write_plain(temporary, step, tokenizer, plain)

    def finish() -> Path:
        with removed_on_failure(temporary):
            if has_adapters(model):  # they alone: the model under them stays as it was
                _save_whole(trained_tensors(model), temporary / "model.safetensors")
                _save_configuration(model, temporary)
            else:
                model.save_pretrained(temporary, save_original_format=False)
            _save_whole(tensors, temporary / "optimizer.safetensors")
            publish(temporary, final)
        _remove_others(folder, final, keep)
        return final

    return finish


def write_parts_checkpoint(
    folder: Path,
    step: int,
    model: Any,
    tokenizer: Any,
    plain: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    ranks: Ranks,
    *,
    keep: int = 1,
) -> Path:
    """The same of weights that are cut over ranks. Every rank calls it, and writes its part.

    Raises:
        UserError: another rank failed; the checkpoint before stands.
    """
    parts = {**dict(named_parts(model)), **tensors}
    return begin_parts_checkpoint(folder, step, model, tokenizer, plain, parts, ranks, keep=keep)(ranks)


def begin_parts_checkpoint(
    folder: Path,
    step: int,
    model: Any,
    tokenizer: Any,
    plain: Mapping[str, Any],
    parts: Mapping[str, Tensor],
    ranks: Ranks,
    *,
    keep: int = 1,
) -> Callable[[Ranks], Path]:
    """The same in two parts. Every rank calls what is returned too, with the ranks of the thread that it is in.

    Args:
        parts: of weights and of the optimizer's tensors; for a thread, those of :func:`thence.train.state.on_host`.

    Raises:
        UserError: another rank failed.
    """
    final, temporary = _places(folder, step) if ranks.rank == 0 else (Path(), folder / f"{WRITING}{step:06d}")

    def prepare() -> None:
        temporary.mkdir(parents=True)
        _save_configuration(model, temporary)
        _write_plain(temporary, step, tokenizer, plain)

    with removed_on_failure(temporary):
        on_first_rank(ranks, prepare)

    def finish(ranks: Ranks) -> Path:
        with removed_on_failure(temporary):
            files = together(ranks, lambda: write_parts(temporary, parts, getattr(ranks, "group", None)))
            digests = together(ranks, lambda: {file.name: _sha256(file) for file in files})
            known = {name: digest for part in ranks.gather(digests) for name, digest in part.items()}
            on_first_rank(ranks, lambda: publish(temporary, final, known))
        on_first_rank(ranks, lambda: _remove_others(folder, final, keep))
        return final

    return finish


def host_copy(model: Any) -> Any:
    """The model as it stands, in host memory, for :func:`begin_checkpoint`: nobody else changes it.

    Of a model with adapters, what is trained; everything else of it has no values.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    copy = skeleton_of(model)
    fill(copy, on_host(dict(named_parts(model))))
    for name, parameter in copy.named_parameters():
        parameter.requires_grad_(name in trained)
    return copy


def _places(folder: Path, step: int) -> tuple[Path, Path]:
    """Where a checkpoint will be, and where it is written; nothing is left there of an earlier try."""
    temporary = folder / f"{WRITING}{step:06d}"
    shutil.rmtree(temporary, ignore_errors=True)
    return folder / f"step-{step:06d}", temporary


def _save_whole(tensors: Mapping[str, Tensor], file: Path) -> None:
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, file)


def _save_configuration(model: Any, folder: Path) -> None:
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _write_plain(folder: Path, step: int, tokenizer: Any, plain: Mapping[str, Any]) -> None:
    tokenizer.save_pretrained(folder)
    (folder / "state.json").write_text(to_json({"step": step, **plain}), encoding="utf-8")


def _remove_others(folder: Path, final: Path, keep: int) -> None:
    # a checkpoint of a later step can only be a damaged one that resuming passed over
    stay = _marked(folder)
    older = [path for path in checkpoints(folder) if path < final and path not in stay]
    later = [path for path in checkpoints(folder) if path > final]
    for superseded in [*older[: max(0, len(older) - (keep - 1))], *later]:
        discard(superseded)


@contextmanager
def removed_on_failure(temporary: Path) -> Iterator[None]:
    """Remove a folder that could not be finished: on a full disk its space is needed."""
    try:
        yield
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def publish(temporary: Path, final: Path, known: Mapping[str, str] | None = None) -> None:
    """Write a manifest of checksums, flush everything to disk and rename the folder into place.

    Args:
        known: checksums that need not be computed again, by file.
    """
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    names = [str(path.relative_to(temporary)) for path in files]
    digests = known or {}
    manifest = {name: digests.get(name) or _sha256(path) for name, path in zip(names, files, strict=True)}
    (temporary / MANIFEST).write_text(to_json(manifest, indent=1), encoding="utf-8")
    for path in [*files, temporary / MANIFEST, temporary]:
        flush(path)
    replaced = final.with_name(f"{REPLACED}{final.name}")
    discard(replaced)
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    flush(final.parent)
    discard(replaced)


def discard(folder: Path) -> None:
    """Remove a model or checkpoint: the files that were written into it, and the folder if nothing else is there."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for name in written_names(folder):
        (folder / name).unlink(missing_ok=True)
    for place in [*sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True), folder]:
        if not any(place.iterdir()):
            place.rmdir()


def written_names(folder: Path) -> list[str]:
    """The files of a model or checkpoint, by its manifest; by what they are called where that cannot be read."""
    manifest = manifest_of(folder)
    if manifest is not None:
        return [MANIFEST, *manifest]
    return [path.name for path in folder.iterdir() if path.is_file() and _NAMED.fullmatch(path.name)]


def remove_checkpoints(folder: Path, *, keep: int = 0) -> None:
    """Remove the checkpoints in a folder but the ``keep`` newest, those marked KEPT and the best, and what others left.

    The folder goes too if it is empty then.
    """
    if folder.is_symlink() or not folder.is_dir():
        return
    found = checkpoints(folder)
    kept = {*(found[-keep:] if keep else ()), *_marked(folder)}
    for path in list(folder.iterdir()):
        if path.name.startswith(WRITING) and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)  # a folder of this name holds what this program writes alone
        elif path.name.removeprefix(REPLACED).startswith("step-") and path not in kept:
            discard(path)
    if not any(folder.iterdir()):
        folder.rmdir()


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(
        path
        for path in folder.glob("step-*")
        if path.is_dir() and not path.is_symlink() and any((path / name).exists() for name in (MANIFEST, "state.json"))
    )


def _marked(folder: Path) -> set[Path]:
    """The checkpoints in a folder that newer ones do not replace: those marked KEPT, and the newest marked BEST."""
    found = checkpoints(folder)
    return {*(path for path in found if has_mark(path, KEPT)), *[path for path in found if has_mark(path, BEST)][-1:]}


def has_mark(folder: Path, mark: str) -> bool:
    """Whether a checkpoint is marked KEPT or BEST; one that cannot be read is not."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and state.get(mark) is True


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint whose checksums hold; a damaged one is passed over, which the log says."""
    for replaced in folder.glob(f"{REPLACED}*"):  # killed between the two renames of `publish`
        if not (place := replaced.with_name(replaced.name.removeprefix(REPLACED))).exists():
            replaced.rename(place)
    return newest_whole(folder)


def newest_whole(folder: Path) -> Checkpoint | None:
    """The same of a folder that another process may be writing into: nothing is changed there."""
    passed_over: list[tuple[Path, Path]] = []
    found = None
    for path in reversed(checkpoints(folder)):
        if (damaged := damaged_file(path)) is None:
            plain = json.loads((path / "state.json").read_text(encoding="utf-8"))
            found = Checkpoint(path, plain.pop("step"), plain)
            break
        passed_over.append((path, damaged))
    follows = f"that of step {found.step} is taken" if found is not None else "there is none before it: from step 0"
    for path, damaged in passed_over:
        step = int(path.name.removeprefix("step-")) if path.name.removeprefix("step-").isdigit() else path.name
        log.warning("the checkpoint of step %s is damaged (%s is not as it was written); %s", step, damaged, follows)
    return found


def is_whole(folder: Path) -> bool:
    """Whether every file that the manifest names is there with its checksum."""
    return damaged_file(folder) is None


def damaged_file(folder: Path) -> Path | None:
    """The first file that is not as the manifest says, the manifest itself if it cannot be read; None: all are."""
    manifest = manifest_of(folder)
    if manifest is None:
        return folder / MANIFEST
    return next((folder / name for name, digest in manifest.items() if _digest_of(folder / name) != digest), None)


def manifest_of(folder: Path) -> dict[str, str] | None:
    """The files of a model or checkpoint with their checksums; None where there is no manifest that can be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(manifest, dict) or not manifest:
        return None
    for name, digest in manifest.items():
        inside = name and not Path(name).is_absolute() and ".." not in Path(name).parts
        if not inside or not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            return None
    return manifest


def _digest_of(path: Path) -> str | None:
    """A file's checksum; of one that has not changed since it was last asked for, what it was then."""
    try:
        state = path.stat()
        key = (str(path.absolute()), state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
        if key not in _known:
            _known[key] = _sha256(path)
        return _known[key]
    except OSError:
        return None


_known: dict[tuple[str, int, int, int, int], str] = {}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
