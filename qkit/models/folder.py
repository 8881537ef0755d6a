"""Hugging Face folders: ``config.json`` and weights in one file or in shards."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qkit.errors import InputError
from qkit.models.factory import offline_transformers, transformers_class
from qkit.models.pickles import read_pickle
from qkit.models.sniff import sniff, weight_files
from qkit.report import package_version

# The names of optimum-quanto's quantization map: of its transformers classes, and in its README.
QUANTO_MAPS = ("quanto_qmap.json", "quantization_map.json")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped from disk."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"cannot read the safetensors file: {error}", where=str(path)) from error


T = TypeVar("T")


def read_tensors(folder: Path, *, trust: bool) -> dict[str, Tensor]:
    """All tensors of the folder, merged as :func:`merge` says."""
    return merge(folder, lambda path: _read_file(path, trust=trust))


def merge(folder: Path, read: Callable[[Path], Mapping[str, T]]) -> dict[str, T]:
    """What ``read`` finds in the weight files; of shards, exactly those that the index names.

    Raises :class:`~qkit.errors.InputError` for a tensor that is missing or stands in two shards.
    """
    tensors: dict[str, T] = {}
    origin: dict[str, str] = {}
    for path in weight_files(folder):
        for name, tensor in read(path).items():
            if name in tensors:
                raise InputError(
                    "a tensor stands in two shards",
                    where=f"{folder}: {name}",
                    got=f"{origin[name]} and {path.name}",
                )
            tensors[name], origin[name] = tensor, path.name
    _check_index(folder, origin)
    return tensors


def _read_file(path: Path, *, trust: bool) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    return dict(check_state_dict(read_pickle(path, sniff(path), trust=trust), path))


def check_state_dict(state: Any, path: Path) -> Mapping[str, Any]:
    """``state``, refused with :class:`~qkit.errors.InputError` if it is not one with names."""
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise InputError("not a state dict", where=str(path), got=f"a {type(state).__name__}")
    return state


def _check_index(folder: Path, origin: dict[str, str]) -> None:
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{stem}.index.json"
        if (folder / stem).is_file():
            return
        if not index.is_file():
            continue
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        wrong = [name for name, shard in named.items() if origin.get(name) != shard]
        if wrong:
            raise InputError(
                "the index names a tensor that is not in its shard",
                where=str(index),
                got=f"{wrong[0]} in {named[wrong[0]]}",
            )
        return


def refuse_quanto(folder: Path) -> None:
    """Raise :class:`~qkit.errors.InputError` for what optimum-quanto has quantized."""
    if any((folder / name).is_file() for name in QUANTO_MAPS):
        raise InputError(
            "the folder is quantized already",
            where=str(folder),
            got="a quantization map of optimum-quanto",
            fix="quantize the float model that it was made from; qkit.load reads this one",
        )


def read_config(folder: Path) -> dict[str, Any] | None:
    """``config.json``, or None where there is none or it names no architecture."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"config.json is corrupt: {error}", where=str(path)) from error
    if not isinstance(config, dict):
        raise InputError("config.json is not an object", where=str(path))
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        raise InputError(
            "the folder is quantized already",
            where=str(path),
            got=method or "a quantization_config",
            fix="quantize the float model that it was made from",
        )
    return config


def check_local(folder: Path, config: dict[str, Any]) -> None:
    """Refuse what makes transformers read other files than those that are checked here."""
    if (folder / "adapter_config.json").exists():
        raise InputError(
            "the folder holds an adapter, not a whole model",
            where=str(folder),
            fix="merge the adapter into its model and save that",
        )
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    for key in ("transformers_weights", "attn_implementation", "_attn_implementation"):
        for value in (part.get(key) for part in parts):
            if value and (key == "transformers_weights" or "/" in str(value)):
                raise InputError(
                    "config.json names other files to load", where=str(folder), got=f"{key} {value}"
                )


def load_transformers(
    folder: Path, config: dict[str, Any], *, trust: bool
) -> tuple[nn.Module, str, list[str]] | None:
    """The folder's model, its class, and remarks; None where transformers is not installed.

    Raises :class:`~qkit.errors.InputError` for weights that are missing or misshapen, and for an
    architecture that needs code from the folder.
    """
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError("config.json names no architecture", where=str(folder), got=repr(names))
    if not names or package_version("transformers") is None:
        return None
    check_local(folder, config)
    read_tensors(folder, trust=trust)  # refuses pickles and shards that transformers would take
    with offline_transformers() as transformers:
        cls = transformers_class(transformers, names[0], folder)
        try:
            model, info = cls.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                weights_only=not trust,
                dtype="auto",
                output_loading_info=True,
            )
        except Exception as error:  # whatever the configuration leads to
            first = (str(error).strip().splitlines() or [""])[0][:200]
            raise InputError(
                f"transformers cannot load the model: {type(error).__name__}: {first}",
                where=str(folder),
            ) from error
    missing = sorted(map(str, info.get("missing_keys", ())))
    if missing or info.get("mismatched_keys"):
        wrong = [str(key) for key in info.get("mismatched_keys", ())]
        raise InputError(
            f"the weights do not fit {names[0]}",
            where=str(folder),
            got=f"{len(missing)} missing: {', '.join(missing[:5])}; {len(wrong)} misshapen: "
            f"{', '.join(wrong[:5])}",
        )
    extra = sorted(map(str, info.get("unexpected_keys", ())))
    notes = (
        [f"{len(extra)} tensors are not used by {names[0]}: {', '.join(extra[:5])}"]
        if extra
        else []
    )
    return model, names[0], notes
