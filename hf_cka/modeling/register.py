"""Make the auto classes of transformers know pruned checkpoints, at the cost of nothing until they are used."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_AUTO_CONFIG = "transformers.models.auto.configuration_auto"


def register() -> None:
    """Register the config type `hf_cka` with `AutoConfig`, now or as soon as transformers loads it.

    `AutoConfig` takes three seconds to import, and `import hf_cka` (or `hf-cka --help`) should not; so where it is not
    loaded yet, an import hook waits for that one module and removes itself. The model classes of a family are made
    and registered when a config of that family is read.

    Example:
        >>> register()
        >>> from transformers import AutoConfig
        >>> AutoConfig.for_model("hf_cka").model_type
        'hf_cka'
    """
    if _AUTO_CONFIG in sys.modules and hasattr(sys.modules[_AUTO_CONFIG], "AutoConfig"):
        _register_now()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _register_now() -> None:
    from transformers import AutoConfig, PreTrainedConfig

    class PrunedConfig(PreTrainedConfig):
        """Reads the config of any pruned checkpoint, and returns the class of its family."""

        model_type = "hf_cka"

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            from hf_cka.modeling.modeling_hf_cka import config_class

            if "base_model_type" not in config_dict:
                raise ValueError(
                    "A config of type 'hf_cka' must name the stock model it was made from in 'base_model_type'; this "
                    f"one has {sorted(config_dict)}."
                )
            if "hf_cka_layout" in config_dict:
                from hf_cka.modeling.format_1 import upgraded

                config_dict = {**config_dict, **upgraded(config_dict).to_dict()}
                for old in ("hf_cka_layout", "per_layer_config", "allow_global_per_layer_attribute_access"):
                    config_dict.pop(old, None)
            return config_class(config_dict["base_model_type"]).from_dict(config_dict, **kwargs)

    AutoConfig.register("hf_cka", PrunedConfig, exist_ok=True)


class _Waiting(importlib.abc.MetaPathFinder):
    """Finds one module as Python would, and registers once it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AUTO_CONFIG:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register_now()
