"""Adapters that were trained on the dense model: move them to the layers that are left, or refuse.

An adapter names layers by number. On a pruned model, whose layers were renumbered, PEFT attaches it to other layers
than it was trained on, without a warning.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from hf_cka.anatomy import Anatomy, find_anatomy
from hf_cka.modeling import modeling_hf_cka as code
from hf_cka.modeling.plan import PruningPlan

_WEIGHTS = "adapter_model.safetensors"


def load_adapter(
    model: Any,
    adapter: str | os.PathLike[str],
    *,
    trained_on: Literal["dense", "pruned"] | None = None,
    **kwargs: Any,
) -> Any:
    """Load an adapter onto a pruned model: as it is if it was trained on it, translated if on the dense model.

    Args:
        model: a model that `apply_plan` pruned, or that was loaded from such a checkpoint.
        adapter: folder of the adapter.
        trained_on: which model the adapter was trained on; told from the adapter where it can be.
        kwargs: passed to `PeftModel.from_pretrained`.

    Returns:
        The `PeftModel`.

    Raises:
        ValueError: if the adapter cannot be told apart, or belongs to projections that were narrowed.
    """
    from peft import PeftModel

    anatomy = find_anatomy(model)
    record = getattr(anatomy.model.config, "pruning", None) or {}
    if "plan" not in record:
        raise ValueError(
            f"{type(anatomy.model).__name__} has no pruning record; load the adapter with PeftModel.from_pretrained."
        )
    if (trained_on or _trained_on(anatomy, record, Path(adapter))) == "pruned":
        return PeftModel.from_pretrained(model, adapter, **kwargs)
    with tempfile.TemporaryDirectory() as folder:
        translate_adapter(adapter, model, Path(folder) / "adapter")
        return PeftModel.from_pretrained(model, Path(folder) / "adapter", **kwargs)


def translate_adapter(
    adapter: str | os.PathLike[str], model: Any, output: str | os.PathLike[str]
) -> dict[str, list[str]]:
    """Write a copy of an adapter, trained on the dense model, that fits the pruned one.

    Weights of layers and sub-layers that are gone are left out, the rest is renumbered.

    Args:
        adapter: folder of the adapter.
        model: the pruned model.
        output: folder to write; it must not exist.

    Returns:
        {"kept": names of the tensors that were kept, "dropped": those that were left out}.

    Raises:
        ValueError: if the adapter touches projections whose width changed, or names layers by a pattern that cannot be
            translated; nothing is written then.
        FileExistsError: if `output` exists.
    """
    from safetensors.torch import load_file, save_file

    source, target = Path(adapter), Path(output)
    if target.exists():
        raise FileExistsError(f"{str(target)!r} exists. Choose a new folder.")
    anatomy = find_anatomy(model)
    record: Any = anatomy.model.config
    names = _Names(anatomy, PruningPlan.from_dict(record.pruning["plan"]))
    tensors = load_file(source / _WEIGHTS)
    kept = {new: value for name, value in tensors.items() if (new := names.tensor(name)) is not None}
    dropped = [name for name in tensors if names.tensor(name) is None]
    if not kept:
        raise ValueError(f"Nothing of the adapter in {str(source)!r} is left: all its layers were removed.")
    config = json.loads((source / "adapter_config.json").read_text())
    config = names.config(config) | {"base_model_name_or_path": _name(anatomy.model)}
    shutil.copytree(
        source, target, ignore=shutil.ignore_patterns(_WEIGHTS, "adapter_config.json", "cka_selection.json")
    )
    save_file(kept, target / _WEIGHTS, metadata={"format": "pt"})
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    return {"kept": sorted(kept), "dropped": sorted(dropped)}


def _trained_on(anatomy: Anatomy, record: Mapping[str, Any], adapter: Path) -> Literal["dense", "pruned"]:
    """Tell which model an adapter was trained on, or raise."""
    from safetensors import safe_open

    with safe_open(adapter / _WEIGHTS, framework="pt") as file:
        layers = {int(i) for name in file.keys() for i in re.findall(_layer_pattern(anatomy), name)}  # noqa: SIM118
    if layers and max(layers) >= max(_numbers(anatomy)) + 1:
        return "dense"
    base = json.loads((adapter / "adapter_config.json").read_text()).get("base_model_name_or_path") or ""
    own, dense = _name(anatomy.model), str(record.get("base_model") or "")
    # a model that was pruned in memory still bears the name of the dense one; an adapter cannot tell them apart then
    if base and _last(own) != _last(dense):
        if _last(base) == _last(own):
            return "pruned"
        if _last(base) == _last(dense):
            return "dense"
    raise ValueError(
        f"The adapter in {str(adapter)!r} was trained on {base!r}. The model is {own!r}, pruned from {dense!r}, so its "
        "layer numbers could mean either. Pass trained_on='dense' or trained_on='pruned'."
    )


def _name(model: Any) -> str:
    return str(getattr(model, "name_or_path", "") or getattr(model.config, "name_or_path", "") or "")


def _last(name: str) -> str:
    """The name of a model without the folders before it, which differ between machines."""
    return name.rstrip("/").rpartition("/")[2]


def _numbers(anatomy: Anatomy) -> list[int]:
    return [int(layer.path.rpartition(".")[2]) for layer in anatomy.stack.layers]


def _layer_pattern(anatomy: Anatomy) -> str:
    return rf"(?<=\b{re.escape(anatomy.layers_path.rpartition('.')[2])}\.)(\d+)(?=\.|$)"


class _Names:
    """Translates names that hold a layer number from the dense model to the pruned one."""

    def __init__(self, anatomy: Anatomy, plan: PruningPlan) -> None:
        self.anatomy, self.plan = anatomy, plan
        names = [layer.path.rpartition(".")[2] for layer in anatomy.stack.layers]
        self.new = {old: int(names[new]) for new, old in enumerate(plan.kept_layers)}
        self.at = {old: new for new, old in enumerate(plan.kept_layers)}
        self.narrow = {i for table in plan.kept.values() for i in table}

    def tensor(self, name: str) -> str | None:
        """The new name, or None where the module is gone."""
        match = re.search(_layer_pattern(self.anatomy), name)
        if match is None:
            return name
        old = int(match.group(1))
        if old not in self.new:
            return None
        layer = self.anatomy.stack.layers[self.at[old]]
        inner = name[match.end() + 1 :]
        module = self.anatomy.model.get_submodule(layer.path)
        for part in inner.split("."):
            module = getattr(module, part, None)  # type: ignore[assignment]
            if isinstance(module, code.Removed) or module is None:
                break
        if isinstance(module, code.Removed):
            return None
        if old in self.narrow:
            for width in layer.widths:
                if any(f"{inner}.".startswith(f"{s.module}.") for s in width.slices) and self._narrowed(
                    old, width.name
                ):
                    raise ValueError(
                        f"The adapter changes {name!r}, whose width was pruned. Merge the adapter into the dense model "
                        "and prune the result, or train it again."
                    )
        return f"{name[: match.start()]}{self.new[old]}{name[match.end() :]}"

    def _narrowed(self, old: int, width: str) -> bool:
        return old in self.plan.kept.get(width, {})

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        """The adapter's config with every layer number translated."""
        result = dict(config)
        layers = config.get("layers_to_transform")
        if layers is not None:
            layers = [layers] if isinstance(layers, int) else layers
            result["layers_to_transform"] = [self.new[i] for i in layers if i in self.new]
        for field in ("target_modules", "exclude_modules", "modules_to_save"):
            if isinstance(config.get(field), list):
                result[field] = self._list(config[field])
            elif isinstance(config.get(field), str):
                self._plain(field, config[field])
        for field in ("rank_pattern", "alpha_pattern"):
            for pattern in config.get(field) or {}:
                self._plain(field, pattern)
        return result

    def _list(self, names: Iterable[str]) -> list[str]:
        translated = (self.tensor(f"{name}.") for name in names)
        return [name.removesuffix(".") for name in translated if name is not None]

    def _plain(self, field: str, pattern: str) -> None:
        if re.search(r"\d", pattern):
            raise ValueError(
                f"The adapter's {field} is the pattern {pattern!r}, which may name layers by number. Merge the adapter "
                "into the dense model and prune the result, or train it again."
            )
