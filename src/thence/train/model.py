"""Opening and saving models in the Hugging Face layout."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from thence import recipe as recipes
from thence.errors import RecipeError, UserError, first_line
from thence.explain import is_of_system
from thence.files import read_json
from thence.models.layers import check_model
from thence.train.finite import broken_weights
from thence.train.gguf import read_once, restore_config, restore_tokenizer
from thence.train.model_files import check_files, resolve
from thence.train.random_start import check_size, made_config

log = logging.getLogger(__name__)
NOISE = ("dropout", "pdrop", "layerdrop", "jitter")  # parts of the names of fields that make training random


@dataclass(frozen=True)
class Loaded:
    """A causal language model with float32 (or float64) weights, and its tokenizer."""

    model: Any
    tokenizer: Any
    origin: str


def load_model(settings: recipes.Model, device: torch.device, seed: int = 0) -> Loaded:
    """Open the model of a recipe, or make it from random weights.

    Args:
        seed: of the random weights, where ``settings.init`` asks for them.

    Raises:
        RecipeError: no such model or tokenizer.
        UserError: a model whose output layer thence cannot take apart.
    """
    with read_once() if settings.gguf_file else nullcontext():
        return _load_model(settings, device, seed)


def _load_model(settings: recipes.Model, device: torch.device, seed: int) -> Loaded:
    from transformers import AutoConfig, AutoModelForCausalLM

    if settings.trust_remote_code:
        log.warning("running Python code shipped by %s (trust_remote_code = true)", settings.path)
    dtype = torch.float64 if settings.compute_dtype == "float64" else torch.float32
    tokenizer = load_tokenizer(settings)
    origin, options = resolve(settings.path or ""), _options(settings)
    try:
        if settings.init is not None:
            config = _without_noise(made_config(settings.init))
            check_size(config, dtype)
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        else:
            config = AutoConfig.from_pretrained(origin, **options)
            restore_config(config, settings)
            config = _without_noise(_overridden(config, settings.config_overrides))
            loading: Any = {"output_loading_info": True, **options, **_unpacked(settings)}
            opened: Any = AutoModelForCausalLM.from_pretrained(origin, config=config, dtype=dtype, **loading)
            model, said = opened
            check_finite(model, origin)
            check_weights(model, Path(origin), said)
            check_generation_file(Path(origin))
    except Exception as error:  # a model's code and files may raise anything
        if isinstance(error, UserError) or is_of_system(error):
            raise
        if "weights_only" in str(error):  # torch then advises how to run what is in the file
            raise RecipeError(
                f"cannot open {settings.path}: its files of weights hold more than tensors, which would be run",
                remedy="give a model with safetensors files",
                field="model.path",
            ) from None
        raise RecipeError(
            f"cannot open {settings.path or settings.init}: {first_line(error)}",
            remedy="give a Hugging Face folder with config.json, weights and tokenizer, or a reachable hub name",
            field="model.path",
        ) from error
    model.to(device)  # pyright: ignore[reportArgumentType] - transformers wraps `to` and loses its type
    model.eval()
    fit_float64(model, dtype)
    make_generation_valid(model)
    check_vocabulary(model, tokenizer)
    check_model(model)
    return Loaded(model, tokenizer, settings.path or "random weights")


def empty_model(settings: recipes.Model) -> Any:
    """The model of a recipe without its weights, all on the meta device: for sizes, and for ranks that are sent them.

    Raises:
        RecipeError: no such model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = torch.float64 if settings.compute_dtype == "float64" else torch.float32
    try:
        if settings.init is not None:
            config = made_config(settings.init)
        else:
            config = AutoConfig.from_pretrained(resolve(settings.path or ""), **_options(settings))
            restore_config(config, settings)
            config = _overridden(config, settings.config_overrides)
        with torch.device("meta"):
            trusted = {"trust_remote_code": settings.trust_remote_code}
            model = AutoModelForCausalLM.from_config(_without_noise(config), dtype=dtype, **trusted)
    except Exception as error:  # a model's code and files may raise anything
        if isinstance(error, UserError) or is_of_system(error):
            raise
        raise RecipeError(
            f"cannot open {settings.path or settings.init}: {first_line(error)}",
            remedy="give a Hugging Face folder with config.json, weights and tokenizer, or a reachable hub name",
            field="model.path",
        ) from error
    model.eval()
    fit_float64(model, dtype)
    return model


def fit_float64(model: Any, dtype: torch.dtype) -> None:
    """Choose implementations that are there for float64."""
    if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # transformers' grouped products are not written for float64


def load_tokenizer(settings: recipes.Model) -> Any:
    """Open the tokenizer of a recipe's model.

    Raises:
        RecipeError: no such model or tokenizer.
        DamagedFile: a file of the model cannot be read.
    """
    from transformers import AutoTokenizer

    check_files(settings)
    name = settings.tokenizer or settings.path or ""
    options = {} if settings.tokenizer else _options(settings)
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(name), **options)
        if not settings.tokenizer:
            restore_tokenizer(tokenizer, settings)
        return tokenizer
    except Exception as error:  # tokenizers raises bare exceptions
        if isinstance(error, UserError) or is_of_system(error):
            raise
        raise RecipeError(
            f"cannot open the tokenizer {name}: {first_line(error)}",
            remedy="give a folder with tokenizer.json, or a reachable hub name",
            field="model.tokenizer" if settings.tokenizer else "model.path",
        ) from error


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write weights (safetensors), configuration and tokenizer; ``AutoModelForCausalLM.from_pretrained`` opens it."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_finite(model: Any, origin: str) -> None:
    """Raise RecipeError where a weight of the model is NaN or infinite."""
    if what := broken_weights(model.named_parameters()):
        raise RecipeError(
            f"the weights of {origin} are not finite: {what}",
            remedy="give a model whose weights are numbers; one that a run trained until it diverged is trained again "
            "with a lower learning rate",
            field="model.path",
        )


def check_weights(model: Any, folder: Path, said: Mapping[str, Any]) -> None:
    """Make sure that the model has the weights that its files hold, all of them.

    transformers draws weights at random that it does not find, with no more than a warning. A few rows of every
    tensor that a safetensors file holds under the model's own name is compared too.

    Args:
        said: what ``from_pretrained`` tells of loading.

    Raises:
        RecipeError: weights that are random, or not those of the file.
    """
    from safetensors import safe_open

    random = sorted(map(str, [*said.get("missing_keys", ()), *said.get("mismatched_keys", ())]))
    if random:
        name = type(model).__name__
        raise RecipeError(
            f"{folder} lacks {len(random)} weights of {name}, the first {random[0]}; they would be random",
            remedy="give a folder with all weights, or the configuration that belongs to it",
            field="model.path",
        )
    if unused := sorted(map(str, said.get("unexpected_keys", ()))):
        log.warning("%d tensors of %s are not used, the first %s", len(unused), folder, unused[0])
    own = model.state_dict()
    padding = getattr(model.get_input_embeddings(), "padding_idx", None) or 0  # a row that some models set to zero
    for file in sorted(folder.glob("model*.safetensors")) if folder.is_dir() else ():
        with safe_open(file, "pt") as tensors:  # pyright: ignore[reportGeneralTypeIssues]
            for name in set(tensors.keys()) & set(own):
                kept = tensors.get_slice(name)
                if kept.get_shape() != list(own[name].shape) or 0 in kept.get_shape() or not own[name].ndim:
                    continue
                last = own[name].shape[0] - 1
                rows = {0, last // 2, last, min(padding, last)}
                if any(not torch.equal(kept[i : i + 1].to(own[name].dtype), own[name][i : i + 1].cpu()) for i in rows):
                    raise RecipeError(
                        f"{type(model).__name__} was opened with another {name} than {file.name} holds",
                        remedy="transformers changed it while opening: try another version of transformers",
                        file=file,
                        field="model.path",
                    )


def check_generation_file(folder: Path) -> None:
    """Make sure that a generation config that is there can be read: transformers passes over one that cannot.

    Raises:
        DamagedFile: it is not a JSON object; the end tokens that it names would be forgotten.
    """
    with suppress(FileNotFoundError, NotADirectoryError):
        read_json(folder / "generation_config.json", remedy="put back a whole copy of it; it names the end tokens")


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Make sure that every token of the tokenizer has its row in the embedding; more rows than tokens are padding.

    Raises:
        RecipeError: tokens beyond the embedding.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    beyond = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= rows)
    if beyond:
        raise RecipeError(
            f"the tokenizer has {len(beyond)} tokens that the model's embedding of {rows} rows has not, the first "
            f"{beyond[0][1]!r} ({beyond[0][0]})",
            remedy="give the tokenizer that belongs to the model, or a model saved after resize_token_embeddings",
            field="model.tokenizer",
        )


def make_generation_valid(model: Any) -> None:
    """Change what the model's generation config says until transformers agrees to save it.

    Llama 2's and Vicuna's have a temperature without ``do_sample``: transformers reads such a file, and refuses to
    write it. Sampling is then switched on, as the temperature means; where that is not enough, only token ids are kept.
    """
    from transformers import GenerationConfig

    config = getattr(model, "generation_config", None)
    if config is None or _is_valid(config):
        return
    kept = {name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for said, changed in (
        ("do_sample is set", GenerationConfig.from_dict({**config.to_dict(), "do_sample": True})),
        ("only its token ids are kept", GenerationConfig(**kept)),
        ("only its end tokens are kept", GenerationConfig(eos_token_id=kept["eos_token_id"])),
    ):
        if _is_valid(changed):
            log.warning("the model's generation_config.json is not valid for saving: %s", said)
            model.generation_config = changed
            return


def _is_valid(config: Any) -> bool:
    try:
        config.validate(strict=True)
    except (ValueError, TypeError):
        return False
    return True


def compute_dtype(settings: recipes.Model, device: torch.device) -> torch.dtype:
    """The dtype of forward and backward passes that the recipe and the device amount to."""
    if settings.compute_dtype != "auto":
        return getattr(torch, settings.compute_dtype)
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def _options(settings: recipes.Model) -> dict[str, Any]:
    options: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
    return options | ({"gguf_file": settings.gguf_file} if settings.gguf_file else {})


def _unpacked(settings: recipes.Model) -> dict[str, Any]:
    """A GGUF model is turned into ordinary weights once; otherwise transformers would refuse to save it."""
    if not settings.gguf_file:
        return {}
    from transformers import GgufConfig

    return {"quantization_config": GgufConfig(dequantize=True)}


def _overridden(config: Any, overrides: dict[str, Any]) -> Any:
    for name, value in overrides.items():
        if name == "rope_theta" and isinstance(getattr(config, "rope_parameters", None), dict):
            config.rope_parameters = {**config.rope_parameters, "rope_theta": value}
        elif hasattr(config, name):
            setattr(config, name, value)
        else:
            raise RecipeError(
                f"{type(config).__name__} has no field {name!r}",
                remedy="look at the model's config.json",
                field=f"model.config_overrides.{name}",
            )
    return config


def _without_noise(config: Any) -> Any:
    """Dropout and its like off: the noise would depend on how a batch is cut, and RL compares a policy with itself."""
    for name, value in list(vars(config).items()):
        if isinstance(value, float) and value and any(word in name for word in NOISE):
            setattr(config, name, 0.0)
    for name in getattr(config, "sub_configs", {}):
        if (inner := getattr(config, name, None)) is not None:
            _without_noise(inner)
    return config
