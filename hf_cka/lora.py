"""``CKALoraConfig``: a ``LoraConfig`` that adapts only the layers CKA chooses.

Two doors to the same thing. Explicit: :meth:`CKALoraConfig.from_model` chooses at once. Lazy: with ``calibration=``
the layers are chosen when PEFT first meets the model, inside an unmodified ``get_peft_model``, ``model.add_adapter``
or TRL trainer. On disk it is a plain LORA config that loads without hf_cka; the selection lies beside it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig, LoraModel, PeftType
from torch import nn

from hf_cka.anatomy import find_anatomy
from hf_cka.data import Batch
from hf_cka.representations import is_main_process
from hf_cka.selection import LayerSelection, select_layers


class _LazyLora(str):
    """The PEFT type of a config whose layers are not chosen yet: equal to LORA, but a key of its own in PEFT's tables.

    ``PeftModel`` picks the tuner by this key and keeps it as its type; because it is equal to ``PeftType.LORA``, plain
    LoRA adapters can be added later. PEFT offers third parties no other way to take part in the choice of the tuner
    (``register_peft_method`` admits members of its own enum only).
    """

    __slots__ = ()

    def __hash__(self) -> int:
        return hash("hf_cka.lazy_lora")

    @property
    def value(self) -> str:
        """The text, as members of ``PeftType`` have it."""
        return str(self)


_LAZY = _LazyLora(PeftType.LORA.value)


class _NotChosen(list[str]):
    """Stands for the target modules until they are chosen: a tuner that does not know how to choose fails on it.

    Without it PEFT's defaults, or no modules at all, would be adapted in silence.
    """

    def __contains__(self, name: object) -> bool:
        raise ValueError(
            "The layers of this CKALoraConfig are not chosen yet: call config.resolve(model) before adding it to a "
            "model that already has adapters."
        )


@dataclass
class CKALoraConfig(LoraConfig):
    """A ``LoraConfig`` for the layers that matter by CKA (arXiv 2602.05988).

    All arguments of ``LoraConfig`` work as they do there, ``init_lora_weights``, ``use_dora`` and ``use_rslora``
    included; ``target_modules`` narrows the projections inside the chosen layers (default: all of them).

    Args:
        keep_ratio: share of the layers to adapt, above 0 and at most 1.
        criterion: how layers are scored; see :func:`hf_cka.select_layers`.
        pooling: how a sequence becomes one vector; see :func:`hf_cka.select_layers`.
        paper: reproduce the paper; see :func:`hf_cka.select_layers`.
        stack: where to choose; see :func:`hf_cka.select_layers`.
        selection_seed: of the criterion ``random``.
        adapt_experts: adapt the experts of the chosen layers too, through PEFT's ``target_parameters``; by default
            layers of experts are adapted in their attention and their shared experts.
        selection_file: use the selection in this file if it is there, else write it there. A script that is started
            again to resume training then adapts the same layers without measuring again.
        calibration: model-ready batches (for example :func:`hf_cka.calibration`), read once when the layers are
            chosen, never stored.

    Raises:
        ValueError: if ``layers_to_transform`` or ``layers_pattern`` is given beside ``calibration``, or
            ``target_parameters`` beside ``adapt_experts``.

    Example:
        >>> config = CKALoraConfig(r=8, calibration=[], keep_ratio=0.5)
        >>> config.is_resolved
        False
    """

    keep_ratio: float = field(default=0.5, metadata={"help": "Share of the layers to adapt."})
    criterion: str = field(default="cka", metadata={"help": "How layers are scored."})
    pooling: str = field(default="auto", metadata={"help": "How a sequence becomes one vector."})
    paper: bool = field(default=False, metadata={"help": "Reproduce arXiv 2602.05988."})
    stack: str | None = field(default=None, metadata={"help": "Which stack of layers to choose in."})
    selection_seed: int = field(default=0, metadata={"help": "Seed of the criterion 'random'."})
    adapt_experts: bool = field(default=False, metadata={"help": "Adapt the experts of the chosen layers too."})
    selection_file: str | None = field(default=None, metadata={"help": "Where the selection is kept between runs."})
    calibration: InitVar[Iterable[Batch] | None] = None

    def __post_init__(self, calibration: Iterable[Batch] | None) -> None:
        wanted = self.target_modules
        super().__post_init__()
        self._wanted = wanted
        self._calibration = calibration
        self._selection: LayerSelection | None = None
        named = self.layers_to_transform is not None or self.layers_pattern is not None
        if named and calibration is not None:
            raise ValueError(
                f"CKALoraConfig chooses the layers itself; remove layers_to_transform={self.layers_to_transform!r} "
                f"and layers_pattern={self.layers_pattern!r}."
            )
        if self.adapt_experts and not named and self.target_parameters:
            raise ValueError(
                f"adapt_experts=True names the parameters of experts itself; remove target_parameters="
                f"{self.target_parameters!r}, or leave adapt_experts out."
            )
        if not named:  # a copy of a finished config (dataclasses.replace) names its layers, and stays as it is
            _register()
            self.peft_type = _LAZY
            self.target_modules = _NotChosen()

    @classmethod
    def from_model(cls, model: nn.Module, batches: Iterable[Batch] | None = None, **kwargs: Any) -> CKALoraConfig:
        """Choose the layers of a model now and return the finished config.

        Args:
            model: the model that will be adapted; left as it was.
            batches: calibration; see :func:`hf_cka.select_layers`.
            **kwargs: of this class.

        Raises:
            ValueError, RuntimeError: as :func:`hf_cka.select_layers`.

        Example:
            >>> config = CKALoraConfig.from_model(model, batches, r=16, keep_ratio=0.5)  # doctest: +SKIP
        """
        config = cls(calibration=batches, **kwargs)
        config.resolve(model)
        return config

    @property
    def is_resolved(self) -> bool:
        """Whether the layers are chosen."""
        return self._selection is not None

    @property
    def selection(self) -> LayerSelection:
        """The selection.

        Raises:
            ValueError: if the layers are not chosen yet.
        """
        if self._selection is None:
            raise ValueError("The layers are not chosen yet: wrap a model with get_peft_model or call resolve(model).")
        return self._selection

    def resolve(self, model: nn.Module) -> LayerSelection:
        """Choose the layers, once; from then on this is an ordinary LORA config.

        Args:
            model: the model that will be adapted; left as it was.

        Raises:
            ValueError: without calibration, for a stored selection of another model, and as
                :func:`hf_cka.select_layers`.
        """
        if self._selection is not None:
            return self._selection
        stored = self.selection_file is not None and Path(self.selection_file).is_file()
        if stored:
            selection = LayerSelection.load(str(self.selection_file))
            _check_same_shape(selection, model, str(self.selection_file))
        else:
            selection = select_layers(
                model,
                self._calibration,
                self.keep_ratio,
                criterion=self.criterion,
                pooling=self.pooling,
                paper=self.paper,
                stack=self.stack,
                seed=self.selection_seed,
            )
        chosen = selection.lora_kwargs(self._wanted, experts=self.adapt_experts)
        if self.selection_file is not None and not stored and is_main_process():
            selection.save(self.selection_file)
        self.target_modules = list(chosen["target_modules"])
        self.layers_to_transform = chosen.get("layers_to_transform")
        self.layers_pattern = chosen.get("layers_pattern")
        if self.adapt_experts:
            self.target_parameters = chosen["target_parameters"]
        self.peft_type = PeftType.LORA
        self._calibration = None
        self._selection = selection
        return selection

    def to_dict(self) -> dict[str, Any]:
        """Return the config as PEFT knows it: without the fields of this class, and of type LORA."""
        known = {name: value for name, value in super().to_dict().items() if name not in _OWN_FIELDS}
        known["peft_type"] = PeftType.LORA
        if self._selection is None and self.peft_type is _LAZY:
            known["target_modules"] = self._wanted
        return known

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json`` as a plain LORA config, and ``cka_selection.json`` beside it.

        Raises:
            ValueError: if the layers are not chosen yet: such a config would adapt other layers when loaded.
        """
        if self._selection is None and self.peft_type is _LAZY:
            raise ValueError("The layers are not chosen yet: wrap a model with this config before saving it.")
        super().save_pretrained(save_directory, **kwargs)
        if self._selection is not None:
            self._selection.save(Path(save_directory))


_OWN_FIELDS = frozenset(CKALoraConfig.__dataclass_fields__) - frozenset(LoraConfig.__dataclass_fields__)


class CKALoraModel(LoraModel):
    """PEFT's LoRA tuner, which first lets a :class:`CKALoraConfig` choose its layers."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Choose the layers, then do what ``LoraModel`` does."""
        config = self.peft_config[adapter_name]
        if isinstance(config, CKALoraConfig):
            config.resolve(model)
        super().inject_adapter(model, adapter_name, *args, **kwargs)


def _register() -> None:
    """Enter the lazy type into PEFT's tables, where ``get_peft_model`` looks tuners up."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    tables: tuple[tuple[dict[Any, Any], Any], ...] = (
        (PEFT_TYPE_TO_CONFIG_MAPPING, CKALoraConfig),
        (PEFT_TYPE_TO_TUNER_MAPPING, CKALoraModel),
        (PEFT_TYPE_TO_PREFIX_MAPPING, CKALoraModel.prefix),
    )
    for table, entry in tables:
        table.setdefault(_LAZY, entry)


def _check_same_shape(selection: LayerSelection, model: nn.Module, file: str) -> None:
    anatomy = find_anatomy(model, selection.layers_path)
    model_type = str(getattr(anatomy.model.config, "model_type", ""))
    have = (model_type, anatomy.num_layers, anatomy.layers_path)
    stored = (selection.model_type, selection.num_hidden_layers, selection.layers_path)
    if have != stored:
        raise ValueError(
            f"The selection in {file!r} was made on another model (type, layers, path): {stored}, this one is {have}. "
            "Delete the file or name another."
        )
