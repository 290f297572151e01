"""Energy where neither RAPL nor NVML tells it, by Zeus (the extra `zeus`): a part of profilers.

    Jetson   Zeus reads the board's power sensor (INA3221) ten times a second, in a process of its
             own, and adds up. A sensor's values: measured. What happens between two samples is
             not seen, and nothing tells of samples that come late.
    Apple    The cumulative counters of the chip's "Energy Model". Apple's own tool calls such
             values estimated, and so are they here: they share no front with measured ones.
    AMD      The cumulative counter of a GPU (ROCm), which Zeus has held against its power first.

For what it does not have, Zeus answers with None, with an object that is empty, or with 0 J. Here
None is refused with the reason; a counter at 0 does not move, which the windows on it refuse.

Written after the source of Zeus 0.16, which is the oldest that tells AMD's GPUs apart as torch
does, and tested with stand-ins of its objects. It has never run on a Jetson, an Apple chip or an
AMD GPU, since none was at hand.
"""

from __future__ import annotations

import functools
import math
import os
import platform
import queue
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpsearch.errors import line_of
from gpsearch.profiling.rapl import Meter

EXTRA = "pip install 'zeus>=0.16'"
_SAMPLED_S = 0.1
"""How often Zeus reads a Jetson's sensor, unless it is asked."""
_JETSON = (Path("etc/nv_tegra_release"), Path("usr/lib/aarch64-linux-gnu/tegra"))
_APPLE = (
    "Apple's model of its chip, not a sensor: Apple calls such values estimated and not fit for "
    "comparing devices"
)
_SILENT = (
    "the process in which Zeus reads the power does not answer: its sensor is gone, or the script "
    "that started it lacks `if __name__ == '__main__':`"
)


class ZeusError(RuntimeError):
    """Zeus cannot tell; the message says what, and why."""


@dataclass(frozen=True)
class _Field:
    """One field of what Zeus returns for a chip, in mJ."""

    name: str
    method: str
    scope: str
    model: str = ""
    period_s: float = 0.0
    """For how long a value is used again: a sum over samples moves with each of them only."""


_SAMPLED = f"INA3221, a sample every {_SAMPLED_S:g} s"
_BOARD = _Field("total_energy_mj", f"zeus:{_SAMPLED}", "board", period_s=_SAMPLED_S)
_READINGS = {
    "cpu": (
        _BOARD,
        _Field("cpu_energy_mj", f"zeus:cpu rail, {_SAMPLED}", "rail", period_s=_SAMPLED_S),
        _Field("cpu_total_mj", "zeus:Apple's Energy Model", "cores", _APPLE),
    ),
    "gpu": (
        _BOARD,
        _Field("gpu_energy_mj", f"zeus:gpu rail, {_SAMPLED}", "rail", period_s=_SAMPLED_S),
    ),
}
"""What tells the energy of each part of a chip, the best first."""


class Source:
    """What a source of energy need not tell."""

    model = ""
    wrap_j: float | None = None

    def watts(self) -> float:
        """Return what the device draws now.

        Raises:
            RuntimeError: It does not tell.
        """
        raise ZeusError("there is no power sensor besides")

    def power_limit_w(self) -> float | None:
        """Return the power that the device keeps below, where it tells."""
        return None

    def disturbances(self, *, ours: bool) -> list[str]:
        """Return who else computes there, where it tells."""
        return []

    def close(self) -> None:
        """Zeus keeps its objects, and they go with the process."""


class SocMeter(Source):
    """Zeus' counter of a system on a chip.

    Args:
        soc: As Zeus' ``get_soc`` returns.
        part: The part of the chip that works: "cpu" or "gpu".
        clock: Seconds; only differences count.

    Raises:
        ZeusError: It has no counter for this part.
    """

    def __init__(
        self, soc: Any, part: str = "cpu", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._soc, self._clock, self._silent = soc, clock, False
        first = self._asked()
        told = [one for one in _READINGS[part] if getattr(first, one.name, None) is not None]
        if not told:
            known = ", ".join(one.name for one in _READINGS[part])
            raise ZeusError(f"Zeus tells no energy of this chip's {part} (none of {known})")
        self._reading = told[0]
        self.method, self.scope = self._reading.method, self._reading.scope
        self.model = self._reading.model
        self._until_s, self._joules = -math.inf, 0.0
        self.joules()

    def joules(self) -> float:
        """Return cumulative J, from some moment on.

        Raises:
            ZeusError: Zeus says nothing, or no number.
        """
        if self._clock() >= self._until_s:
            if self._reading.period_s:
                self._asked()  # is answered with the last sample, and takes a new one
            self._joules = self._number(self._asked()) / 1e3
            self._until_s = self._clock() + self._reading.period_s
        return self._joules

    def _number(self, answer: Any) -> float:
        value = getattr(answer, self._reading.name, None)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ZeusError(f"Zeus says {value} for {self._reading.name}")
        return float(value)

    def _asked(self) -> Any:
        """Return what Zeus says of the chip."""
        if self._silent:
            raise ZeusError(_SILENT)
        try:
            return self._soc.get_total_energy_consumption()
        except queue.Empty as error:
            self._silent = True  # and stays so: an answer to come would be taken for that of now
            raise ZeusError(_SILENT) from error
        except Exception as error:  # whatever is beneath Zeus may raise
            raise ZeusError(f"Zeus cannot read this chip's energy: {line_of(error)}") from error


def _get_soc() -> Any:
    from zeus.device.soc import get_soc

    return get_soc()


@dataclass(frozen=True)
class Chip:
    """The system on a chip that this runs on, as far as files under ``root`` tell."""

    system: str = platform.system()
    machine: str = platform.machine()
    root: Path = Path("/")
    get_soc: Callable[[], Any] = _get_soc
    """Zeus' own, imported when it is called."""

    @property
    def jetson(self) -> bool:
        """Whether this is one of NVIDIA's boards."""
        here = (self.system, self.machine) == ("Linux", "aarch64")
        return here and any((self.root / mark).exists() for mark in _JETSON)

    @property
    def apple(self) -> bool:
        """Whether this is one of Apple's own chips."""
        return (self.system, self.machine) == ("Darwin", "arm64")

    def meter(self, otherwise: Meter | str) -> Meter | str:
        """Return Zeus' meter of the processor, or why there is none and the remedy.

        Args:
            otherwise: Another way to its energy, or why there is none; it stays if it is a way, or
                if Zeus does not know such a machine.
        """
        if not isinstance(otherwise, str) or not (self.jetson or self.apple):
            return otherwise
        try:
            return self.source("cpu")
        except (ImportError, ZeusError) as error:
            return str(error)

    def source(self, part: str) -> SocMeter:
        """Return Zeus' counter of a part of the chip, "cpu" or "gpu".

        Raises:
            ImportError: Zeus is missing.
            ZeusError: It knows of none here.
        """
        name = "a Jetson" if self.jetson else "an Apple chip"
        try:
            return SocMeter(self.get_soc(), part)
        except ImportError as error:
            raise _missing(name) from error
        except ZeusError:
            raise
        except Exception as error:  # Zeus' own, of many kinds
            why_not = f"Zeus does not know {name} here ({line_of(error)})"
            raise ZeusError(f"{why_not}: see to all that `{EXTRA}` brings") from error


@functools.cache  # when one is deleted, AMD's library shuts down for all
def _amd_gpus() -> Any:
    from zeus.device.gpu import AMDGPUs, amdsmi_is_available

    if not amdsmi_is_available():
        raise ZeusError(
            "AMD's library does not answer: see to ROCm 6.2 or newer, and to the package amdsmi "
            "in the version of ROCm"
        )
    return AMDGPUs()


class AmdBoard(Source):
    """What Zeus says of one AMD GPU.

    Args:
        index: Its number among the devices that torch sees.
        count: How many torch sees.
        get_gpus: Zeus' GPUs; imported when it is called.
        environment: Where variables may hide devices.

    Raises:
        RuntimeError: The energy counter cannot be used; the message says why.
        ImportError: Zeus is missing.
    """

    method, scope = "zeus:amdsmi energy count", "board"

    def __init__(
        self,
        index: int,
        count: int,
        get_gpus: Callable[[], Any] = _amd_gpus,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        if environment.get("ROCR_VISIBLE_DEVICES"):
            raise ZeusError(
                "ROCR_VISIBLE_DEVICES numbers the devices anew, and Zeus does not know how: use "
                "HIP_VISIBLE_DEVICES"
            )
        try:
            gpus = get_gpus().gpus
        except ImportError as error:
            raise _missing("an AMD GPU") from error
        except ZeusError:
            raise
        except Exception as error:  # Zeus' own, of many kinds
            raise ZeusError(f"Zeus finds no AMD GPU ({line_of(error)})") from error
        if len(gpus) != count:
            raise ZeusError(f"Zeus sees {len(gpus)} AMD GPUs and torch {count}: which is which?")
        self._gpu = gpus[index]
        if not self._ask("supports_get_total_energy_consumption"):
            raise ZeusError(
                "Zeus refuses this board's energy counter: it contradicts the board's power, or "
                "the other half of the board counts for both"
            )

    def joules(self) -> float:
        """Return cumulative J since the driver was loaded."""
        return self._ask("get_total_energy_consumption") / 1e3

    def watts(self) -> float:
        """Return what the board draws, on average if it tells.

        Raises:
            ZeusError: It does not tell.
        """
        try:
            return self._ask("get_average_power_usage") / 1e3
        except ZeusError:
            return self._ask("get_instant_power_usage") / 1e3

    def power_limit_w(self) -> float | None:
        """Return the power that the board keeps below, where it tells."""
        try:
            return self._ask("get_power_management_limit") / 1e3 or None
        except ZeusError:
            return None

    def _ask(self, question: str) -> float:
        """Return a number that Zeus knows of the board."""
        try:
            answer = getattr(self._gpu, question)()
        except Exception as error:  # Zeus' own, of many kinds
            raise ZeusError(f"Zeus cannot read this board: {line_of(error)}") from error
        if not isinstance(answer, int | float) or not math.isfinite(answer):
            raise ZeusError(f"Zeus says {answer} for {question}")
        return float(answer)


def _missing(name: str) -> ImportError:
    return ImportError(f"the energy of {name} is read by Zeus, which is missing: {EXTRA}")
