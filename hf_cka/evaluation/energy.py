"""Energy and CO2 of generating text, through codecarbon: read from counters where there are any, else estimated.

Which part is which is always said. Nothing is sent anywhere: the country of the electricity is given, never looked up.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from hf_cka.evaluation.efficiency import decode_speed

_JOULES = 3.6e6  # in a kWh


@dataclass(frozen=True)
class Energy:
    """Energy that the whole machine used while a model generated text.

    Args:
        cpu_joules: of the processors.
        gpu_joules: of the GPUs.
        ram_joules: of the memory.
        measured: which of "cpu", "gpu", "ram" come from counters of the hardware; the others are estimates from
            the kind of hardware.
        tokens: that were generated, of all rows together.
        seconds: it took, prefills included.
        country: ISO code of the electricity's country; None if it was not given.
        co2_grams: with that country's mean intensity; None without one.
    """

    cpu_joules: float
    gpu_joules: float
    ram_joules: float
    measured: tuple[str, ...]
    tokens: int
    seconds: float
    country: str | None = None
    co2_grams: float | None = None

    @property
    def joules(self) -> float:
        """Of all parts together."""
        return self.cpu_joules + self.gpu_joules + self.ram_joules

    @property
    def joules_per_token(self) -> float:
        """Of all parts together, for a generated token."""
        return self.joules / self.tokens

    @property
    def estimated(self) -> tuple[str, ...]:
        """Parts that used energy by codecarbon's estimate, not by a counter.

        Example:
            >>> Energy(8.0, 0.0, 2.0, ("cpu",), tokens=5, seconds=1.0).estimated
            ('ram',)
        """
        parts = {"cpu": self.cpu_joules, "gpu": self.gpu_joules, "ram": self.ram_joules}
        return tuple(name for name, joules in parts.items() if joules > 0 and name not in self.measured)


def generation_energy(
    model: Any,
    *,
    prompt_tokens: int = 12,
    new_tokens: int = 128,
    batch_size: int = 1,
    seconds: float = 5.0,
    country: str | None = None,
) -> Energy:
    """Measure the energy of greedy generation, repeated for a while.

    The energy is that of the machine: on a shared one it holds what others do, too.

    Args:
        model: a causal language model.
        prompt_tokens: of each prompt.
        new_tokens: generated after each.
        batch_size: rows.
        seconds: to go on for at least; power is sampled about once a second, so short runs say little.
        country: three-letter ISO code, for CO2.

    Raises:
        ImportError: without codecarbon; the message gives the command.
        ValueError: for seconds that are not positive, an unknown country, or as :func:`decode_speed`.
        RuntimeError: if codecarbon cannot run here.

    Source: codecarbon (https://github.com/mlco2/codecarbon).

    Example:
        >>> energy = generation_energy(model, country="FRA")  # doctest: +SKIP
        >>> energy.joules_per_token, energy.estimated  # doctest: +SKIP
        (0.9, ('ram',))
    """
    if seconds <= 0:
        raise ValueError(f"seconds={seconds} must be positive.")
    try:
        from codecarbon import OfflineEmissionsTracker
        from codecarbon.core.cpu import is_rapl_available
        from codecarbon.input import DataSource
    except ImportError as error:
        raise ImportError("Measuring energy needs codecarbon: pip install 'hf_cka[energy]'") from error
    if country is not None and country not in (known := DataSource().get_global_energy_mix_data()):
        raise ValueError(f"Unknown country {country!r}: give a three-letter ISO code, such as {sorted(known)[0]!r}.")
    # a country is required; where none was given the CO2 is left out below
    tracker = OfflineEmissionsTracker(
        country_iso_code=country or "USA",
        measure_power_secs=1,
        save_to_file=False,
        log_level="critical",
        allow_multiple_runs=True,
    )
    runs = 0
    tracker.start()
    begin = time.perf_counter()
    try:
        while time.perf_counter() - begin < seconds:
            decode_speed(
                model,
                prompt_tokens=prompt_tokens,
                new_tokens=new_tokens,
                batch_size=batch_size,
                repeats=1,
                warmup=0,
                progress=False,
            )
            runs += 1
    finally:
        elapsed = time.perf_counter() - begin
        emissions = tracker.stop()
    data = tracker.final_emissions_data
    if data is None or emissions is None:
        raise RuntimeError(
            "codecarbon measured nothing on this machine: leave the energy out, or see its own documentation."
        )
    return Energy(
        cpu_joules=data.cpu_energy * _JOULES,
        gpu_joules=data.gpu_energy * _JOULES,
        ram_joules=data.ram_energy * _JOULES,
        measured=(("cpu",) if is_rapl_available() else ()) + (("gpu",) if data.gpu_energy > 0 else ()),
        tokens=runs * new_tokens * batch_size,
        seconds=elapsed,
        country=country,
        co2_grams=None if country is None else emissions * 1000,
    )
