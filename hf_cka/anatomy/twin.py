"""The twin: the same class with the same depth and per-layer pattern, small, random, on the CPU, to experiment on.

The user's weights are never needed and never touched.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hf_cka.anatomy.inputs import probe_batches

# A model of at most this many parameters is its own twin; larger ones are shrunk, if their config lets itself be.
SMALL = 3_000_000
# More parameters than this are never experimented on: float32 weights and gradients of half a gigabyte each.
LARGEST = 130_000_000
# Frames that a speech encoder is given where its config says how many: Whisper's 1,500 cost seconds a run.
_FRAMES = 32
# Config fields that hold a width of the model, and those among them that only look like one.
_WIDTHS = re.compile(
    r"(hidden|size|dim|width|rank|d_model|d_ff|d_kv|n_embd|n_inner|channels|inner|embd|embed|lora|state)"
)
_COUNTS = re.compile(
    r"(vocab|position|image|patch|window|kernel|token|layers|heads|experts|groups|max_|mel|stride|scale|context|chunk|"
    r"block|^num_|^n_(?!embd|inner)|type|expand|ratio|factor|conv_|codebook|bucket|head_size$|in_channels|num_channels)"
)


class Twin:
    """A small model and inputs on which it runs.

    Args:
        model: float64 where it runs so, else float32; in eval mode.
        batch: what it is run on.
        scale: by what the widths of the real model are larger; 1 where it has the same sizes.

        exchanged: names of modules that the model put others in the place of as it ran (BigBird's attention).

    Attributes:
        tolerance: how far equal outputs may differ, relative to the largest.
    """

    def __init__(
        self, model: nn.Module, batch: dict[str, torch.Tensor], scale: int, exchanged: frozenset[str] = frozenset()
    ) -> None:
        self.model, self.batch, self.scale, self.exchanged = model, batch, scale, exchanged
        self.dense = outputs(model, batch)
        self.tolerance = 1e-9 if self.dense[0].dtype == torch.float64 else 2e-5

    def far(self, other: list[torch.Tensor] | None) -> float:
        """How far outputs are from the dense ones, relative to the largest; infinite where they are not comparable."""
        return distance(self.dense, other)


def distance(one: list[torch.Tensor], two: list[torch.Tensor] | None) -> float:
    """The largest difference between outputs, relative to the largest value of each."""
    if two is None or len(one) != len(two):
        return math.inf
    worst = 0.0
    for a, b in zip(one, two, strict=True):
        if a.shape != b.shape or not b.isfinite().all():
            return math.inf
        worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp_min(1e-12)) if a.numel() else 0.0)
    return worst


def make_twin(model: Any) -> Twin:
    """Build the twin of a model.

    Args:
        model: a `PreTrainedModel`, on any device, meta included; only its class, config and shapes are read.

    Raises:
        ValueError: where nothing small enough could be built and run; the message says what was tried.
    """
    tried: list[str] = []
    for config, scale in _configs(model, tried):
        try:
            with quiet():
                twin = _build(model, config)
        except Exception as error:
            tried.append(f"1/{scale}: {type(error).__name__} {error}"[:160])
            continue
        built = dict(twin.named_modules())
        for dtype in (torch.float64, torch.float32):
            twin = twin.to(dtype)
            found = _first_that_runs(twin, tried)
            if found is not None:
                for batch in (found, text_alone(found)):
                    if batch and _draws(twin, batch):
                        raise ValueError(f"{type(model).__name__} draws random numbers on {' and '.join(batch)} alone.")
                exchanged = frozenset(n for n, m in twin.named_modules() if built.get(n) is not m)
                return Twin(twin, found, scale, exchanged)
    raise ValueError(
        f"{type(model).__name__} could not be run at a small size "
        f"({'; '.join(dict.fromkeys(tried[-3:])) or 'too large'})."
    )


def text_alone(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a text model is given of a batch; empty where there is no text, or nothing else."""
    text = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
    return text if "input_ids" in text and len(text) < len(batch) else {}


def _draws(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> bool:
    """Whether two runs on the same inputs differ."""
    with torch.random.fork_rng(devices=[]):
        try:
            return not all(map(torch.equal, outputs(model, batch), outputs(model, batch)))
        except Exception:
            return False


def _configs(model: Any, tried: list[str]) -> Iterator[tuple[Any, int]]:
    """The model's own config if that is small, else shrunk ones, mildest last."""
    count = sum(p.numel() for p in model.parameters())
    if count <= SMALL:
        yield copy.deepcopy(model.config), 1
        return
    shapes = {name: p.shape for name, p in model.named_parameters()}
    for divisor in (64, 32, 16, 8, 4, 2):
        config = shrunk(model.config, divisor)
        if _too_thin(model.config, config):
            tried.append(f"1/{divisor}: heads of one index")
            continue
        try:
            with quiet(), torch.device("meta"):
                small = _stock(type(model))._from_config(copy.deepcopy(config))
        except Exception as error:
            tried.append(f"1/{divisor}: {type(error).__name__} {error}"[:160])
            continue
        same = {name: p.ndim for name, p in small.named_parameters()} == {n: len(s) for n, s in shapes.items()}
        if same and sum(p.numel() for p in small.parameters()) <= LARGEST:
            yield config, divisor
    if count <= LARGEST:
        yield copy.deepcopy(model.config), 1


def shrunk(config: Any, divisor: int) -> Any:
    """A copy of a config whose widths are divided by a number, as far as they can be; counts stay.

    Args:
        config: of a model.
        divisor: a power of two.

    Example:
        >>> from transformers import LlamaConfig
        >>> small = shrunk(LlamaConfig(), 16)
        >>> small.hidden_size, small.num_attention_heads, small.head_dim, small.num_hidden_layers
        (256, 32, 8, 32)
    """
    small = copy.deepcopy(config)
    for key, value in list(vars(small).items()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            small.__dict__[key] = shrunk(value, divisor)
        elif key == "vocab_size" and type(value) is int:
            small.__dict__[key] = value if value <= 512 or _highest_id(config) >= 500 else 512
        elif key == "max_source_positions" and type(value) is int:
            small.__dict__[key] = min(value, _FRAMES)
        elif key.endswith("chunk_size") and type(value) is int:
            small.__dict__[key] = min(value, 8)  # of a scan: a way of computing, which costs a short text the most
        elif key == "rope_parameters" and isinstance(value, Mapping):
            small.__dict__[key] = _shrunk_rope(value, divisor)
        elif key == "head_dim" and type(value) is int:
            small.__dict__[key] = max(4, value // divisor) if value % 4 == 0 else value
        elif _WIDTHS.search(key) and not _COUNTS.search(key):
            small.__dict__[key] = _divided(value, divisor)
    return small


def _divided(value: Any, divisor: int) -> Any:
    if isinstance(value, (list, tuple)):
        # stages stay in proportion
        while divisor > 1 and not all(type(v) is int and _divided(v, divisor) < v for v in value):
            divisor //= 2
        return type(value)(_divided(v, divisor) for v in value)
    return value // divisor if type(value) is int and value >= 4 * divisor and value % divisor == 0 else value


def _too_thin(config: Any, small: Any) -> bool:
    """Whether a width came down to the number of heads: of one index each they cannot be told from units."""
    numbers: dict[bool, set[int]] = {True: set(), False: set()}
    for key, value in vars(small).items():
        before = config.__dict__.get(key)
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            if _too_thin(before, value):
                return True
        elif "dim" not in key and re.search("head", key):
            numbers[True] |= set(_numbers(value))
        elif "head" not in key and value != before:
            numbers[False] |= set(_numbers(value))
    return bool(numbers[True] & numbers[False] - {1})


def _numbers(value: Any) -> list[int]:
    return [v for v in (value if isinstance(value, list | tuple) else [value]) if type(v) is int]


def _shrunk_rope(rope: Mapping[str, Any], divisor: int) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for key, value in rope.items():
        if isinstance(value, Mapping):
            small[key] = _shrunk_rope(value, divisor)
        elif key == "mrope_section":
            small[key] = [max(1, v // divisor) for v in value]
        elif key in ("short_factor", "long_factor"):
            small[key] = list(value)[: max(1, len(value) // divisor)]
        else:
            small[key] = value
    return small


def _highest_id(config: Any) -> int:
    from hf_cka.anatomy.inputs import special_ids

    return max(special_ids(config), default=0)


def _stock(cls: type) -> Any:
    return getattr(cls, "stock_class", cls)


def _build(model: Any, config: Any) -> Any:
    """A model of that config with weights that all matter: no zero gate, no neutral norm, no silent bias."""
    stock = _stock(type(model))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for options in (
            {"attn_implementation": "eager", "experts_implementation": "eager"},
            {"attn_implementation": "eager"},
            {},
        ):
            try:
                twin = stock._from_config(copy.deepcopy(config), dtype=torch.float32, **options)
                break
            except (ValueError, TypeError, ImportError) as error:
                last = error
        else:
            raise last
    for module in twin.modules():  # a layer is called again on its own, and must not meet what a cache remembers
        if getattr(getattr(module, "config", None), "use_cache", None) is True:
            module.config.use_cache = False
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in itertools.chain(twin.named_parameters(), _statistics(twin)):
            if not p.is_floating_point():
                continue
            noise = torch.randn(p.shape, generator=draw)
            if p.ndim <= 1:
                if not p.isfinite().all() or p.abs().max() > 1e3:
                    p.zero_()
                p.add_(noise * 0.1)
                if name.endswith("running_var"):
                    p.abs_().add_(0.5)
            elif not p.isfinite().all() or p.abs().max() > 1e3 or p.std() < 0.3 or p.std() != p.std():
                fan = p[0].numel() if p.ndim == 2 else p.shape[-1]
                p.copy_(noise * (0.5 if "embed" in name else 1.5 / math.sqrt(max(1, fan))))
    return twin.eval()


def _statistics(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return ((n, b) for n, b in model.named_buffers() if n.endswith(("running_mean", "running_var")))


def _first_that_runs(twin: Any, tried: list[str]) -> dict[str, torch.Tensor] | None:
    dtype = next(p.dtype for p in twin.parameters() if p.is_floating_point())
    with quiet():
        for batch in probe_batches(twin):
            batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
            try:
                found = outputs(twin, batch)
                if found and all(o.isfinite().all() for o in found):
                    return batch
                tried.append("its output is not finite")
            except Exception as error:
                tried.append(f"{'+'.join(batch)}: {type(error).__name__} {error}"[:160])
    return None


def outputs(model: Any, batch: Mapping[str, torch.Tensor], grad: bool = False) -> list[torch.Tensor]:
    """What a model gives: its logits where it has some, else its hidden states.

    Args:
        model: a `PreTrainedModel`.
        batch: model-ready.
        grad: let gradients flow.
    """
    more = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with torch.set_grad_enabled(grad):
        out = model(**batch, **more)
    for name in ("logits", "start_logits", "pred_boxes", "last_hidden_state"):
        value = getattr(out, name, None)
        if value is not None:
            return tensors_of(value)
    return tensors_of(out)[:1]


def tensors_of(value: Any) -> list[torch.Tensor]:
    """All floating-point tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in tensors_of(v)]
    return []


@contextmanager
def one_thread() -> Iterator[None]:
    """Experiments are thousands of tiny products: threads would wait for each other longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def quiet() -> Iterator[None]:
    """Experiments warn about settings that no user chose."""
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
