"""Resources: what tasks and actors ask for, and what a node has.

Role: pure. `parse_resources` turns what a user wrote into a checked mapping of names to amounts; `ResourceSet` is that
mapping in fixed point, immutable and hashable, so that equal requests can share one queue; `NodeResources` is what one
node has in all and what of it is free.

Rules:
- Amounts are whole numbers of 1/10,000 inside. Sums of floats drift (ten times 0.1 CPU is not one CPU), and a node that
  drifts runs one task too few, or too many, for ever.
- An amount of zero is no entry, so equal requests are equal sets.
- Free plus held is the total, always: releasing more than is held raises, for it can only be a bug of ours.
- Free may be negative: a worker that wakes up in `get` takes its CPU back whether or not somebody else has it now
  (`force_allocate`). New requests wait until it is positive again.

Rejected: `decimal` (20 times slower, and the precision is a setting of the thread); a vector with one column for each
known name (custom names come and go; a request has one or two entries).
"""

from __future__ import annotations

import math
from collections.abc import ItemsView, Mapping
from numbers import Real
from typing import Any, Final

UNITS_PER_ONE: Final = 10_000
"""Fixed-point units in one CPU, one GPU, one byte of memory."""

AMOUNT_MAX: Final = 1 << 60
"""More than this of anything is a mistake (an exbibyte of memory)."""

CPU: Final = "CPU"
GPU: Final = "GPU"
MEMORY: Final = "memory"
_RESERVED: Final = {CPU: "num_cpus", GPU: "num_gpus", MEMORY: "memory"}


class ResourceAccountingError(RuntimeError):
    """Resources were taken that were not free, or given back that were not held: a bug in the caller."""


def parse_resources(
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    memory: float | None = None,
    resources: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Checks what a user asks for (or gives a node) and returns amounts by name: `CPU`, `GPU`, `memory`, custom ones.

    `memory` is in bytes, rounded up to whole ones. What is None or zero has no entry. Defaults are the caller's matter.

    Raises TypeError for what is not a number (bool included) or not a mapping of names, ValueError for amounts that are
    negative, not finite, too large or finer than 1/10,000, for more than one GPU that is not a whole number, and for
    names that are empty or have an option of their own.
    """
    amounts: dict[str, float] = {}
    if num_cpus is not None:
        amounts[CPU] = _amount("num_cpus", num_cpus)
    if num_gpus is not None:
        gpus = _amount("num_gpus", num_gpus)
        if gpus > 1 and gpus != int(gpus):
            raise ValueError(f"num_gpus={num_gpus!r}: above 1, GPUs are given out whole; ask for {math.ceil(gpus)}")
        amounts[GPU] = gpus
    if memory is not None:
        amounts[MEMORY] = _whole_bytes(memory)
    if resources is not None:
        if not isinstance(resources, Mapping):
            raise TypeError(
                f"resources must be a dict of names to amounts, like {{'disk': 1}}, not {type(resources).__name__}"
            )
        for name, value in resources.items():
            if not isinstance(name, str):
                raise TypeError(f"resources: a name must be a string, not {name!r}")
            if not name.strip():
                raise ValueError("resources: a name is empty")
            if name in _RESERVED:
                raise ValueError(f"resources[{name!r}]: use the option {_RESERVED[name]} for it")
            amounts[name] = _amount(f"resources[{name!r}]", value)
    return {name: amount for name, amount in amounts.items() if amount}


def _checked(what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{what} must be a number, not {value!r} ({type(value).__name__})")
    number: Any = value
    try:
        amount = float(number)
    except OverflowError:
        amount = float(AMOUNT_MAX if number > 0 else -AMOUNT_MAX)
    if math.isnan(amount) or amount == math.inf:
        raise ValueError(f"{what}={value!r} is not a finite number")
    if amount < 0:
        raise ValueError(f"{what}={value!r} is negative")
    if amount >= AMOUNT_MAX:
        raise ValueError(f"{what} is too large: {amount:.4g} (the limit is 2**60)")
    return amount


def _amount(what: str, value: Any) -> float:
    amount = _checked(what, value)
    try:
        return _to_units(amount) / UNITS_PER_ONE
    except ValueError:
        raise ValueError(f"{what}={value!r} is finer than 1/{UNITS_PER_ONE:,}, the smallest step") from None


def _whole_bytes(value: Any) -> float:
    return float(math.ceil(_checked("memory", value)))


def _to_units(amount: float) -> int:
    """Fixed point of a checked amount. Raises ValueError when it has digits below one unit, rounding errors aside."""
    scaled = amount * UNITS_PER_ONE
    units = round(scaled)
    # One millionth of a unit forgives what binary floats do to 0.0007 or 0.1 + 0.2, and nothing a person would write.
    if abs(scaled - units) > max(1e-6, scaled * 1e-15):
        raise ValueError(f"{amount!r} is finer than 1/{UNITS_PER_ONE:,}")
    return units


class ResourceSet:
    """Amounts by name in fixed-point units. Immutable and hashable; has no zero entries."""

    __slots__ = ("_hash", "units")

    units: dict[str, int]
    """Units by name. Shared, never to be changed."""

    def __init__(self, units: Mapping[str, int]) -> None:
        self.units = {name: amount for name, amount in units.items() if amount}
        self._hash = hash(frozenset(self.units.items()))

    @classmethod
    def of(cls, amounts: Mapping[str, float]) -> ResourceSet:
        """From amounts by name, as `parse_resources` returns them or a peer sends them.

        Raises TypeError or ValueError, naming the entry, for amounts that are not finite numbers of zero or more, finer
        than 1/10,000 or too large, and for names that are not strings.
        """
        units: dict[str, int] = {}
        for name, value in amounts.items():
            if not isinstance(name, str) or not name:
                raise TypeError(f"a resource's name must be a string that is not empty, not {name!r}")
            units[name] = _to_units(_amount(name, value))
        return cls(units)

    def amounts(self) -> dict[str, float]:
        """Amounts by name, in whole CPUs, GPUs, bytes."""
        return {name: units / UNITS_PER_ONE for name, units in self.units.items()}

    def items(self) -> ItemsView[str, int]:
        """Name and units of each entry."""
        return self.units.items()

    def __bool__(self) -> bool:
        return bool(self.units)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ResourceSet) and self.units == other.units

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"ResourceSet({self.amounts()})"


class NodeResources:
    """What one node has in all, and what is free. Mutable; one instance for each node."""

    __slots__ = ("_available", "_total")

    def __init__(self, total: ResourceSet) -> None:
        self._total = dict(total.units)
        self._available = dict(total.units)

    @property
    def total(self) -> dict[str, float]:
        """Amounts by name in all."""
        return {name: units / UNITS_PER_ONE for name, units in self._total.items()}

    @property
    def available(self) -> dict[str, float]:
        """Amounts by name that are free; negative where workers that woke up took theirs back."""
        return {name: units / UNITS_PER_ONE for name, units in self._available.items()}

    def total_units(self, name: str) -> int:
        """What there is of it in all, free or not."""
        return self._total.get(name, 0)

    def fits(self, request: ResourceSet) -> bool:
        """Whether the request could be allocated now."""
        available = self._available
        for name, units in request.units.items():  # a loop: half the time of all() over a generator
            if available.get(name, 0) < units:
                return False
        return True

    def feasible(self, request: ResourceSet, besides: Mapping[str, int] | None = None) -> bool:
        """Whether the request could ever be allocated, with nothing else held but the units of `besides`."""
        total = self._total
        taken = besides or {}
        return all(total.get(name, 0) - taken.get(name, 0) >= units for name, units in request.units.items())

    def fits_beside(self, request: ResourceSet, reserved: ResourceSet) -> bool:
        """Whether the request could be allocated now and leave what `reserved` needs of the same resources."""
        available = self._available
        for name, units in request.units.items():
            if available.get(name, 0) < units + reserved.units.get(name, 0):
                return False
        return True

    def short(self, request: ResourceSet) -> dict[str, int]:
        """Units by name that would have to come free before the request fits; empty if it does."""
        available = self._available
        return {
            name: units - available.get(name, 0)
            for name, units in request.units.items()
            if available.get(name, 0) < units
        }

    def allocate(self, request: ResourceSet) -> None:
        """Takes the request. Raises ResourceAccountingError if it does not fit."""
        if not self.fits(request):
            raise ResourceAccountingError(f"allocated what is not free: {self.missing(request)}")
        self.force_allocate(request)

    def force_allocate(self, request: ResourceSet) -> None:
        """Takes the request whether or not it fits; `available` may become negative until others release."""
        available = self._available
        for name, units in request.units.items():
            available[name] = available.get(name, 0) - units

    def release(self, request: ResourceSet) -> None:
        """Gives the request back. Raises ResourceAccountingError, and changes nothing, if that much is not held."""
        available, total = self._available, self._total
        for name, units in request.units.items():
            if available.get(name, 0) + units > total.get(name, 0):
                raise ResourceAccountingError(
                    f"released {_show(name, units)} that is not held: "
                    f"{_show(name, available.get(name, 0))} of {_show(name, total.get(name, 0))} is free"
                )
        for name, units in request.units.items():
            if name in total or available[name] + units:
                available[name] += units
            else:
                del available[name]  # the last of a resource that the node has lost meanwhile

    def set_total(self, total: ResourceSet) -> None:
        """Changes what the node has; what is held stays held, so `available` may become negative."""
        for name in set(self._total) | set(total.units):
            change = total.units.get(name, 0) - self._total.get(name, 0)
            units = self._available.get(name, 0) + change
            if units or name in total.units:
                self._available[name] = units
            else:
                self._available.pop(name, None)
        self._total = dict(total.units)

    def change_total(self, units: Mapping[str, int], sign: int) -> None:
        """The node has so much more (`sign` 1) or less (-1) of these; what is held of them stays held."""
        for name, amount in units.items():
            total = self._total.get(name, 0) + sign * amount
            available = self._available.get(name, 0) + sign * amount
            if total:
                self._total[name] = total
            else:
                self._total.pop(name, None)
            if available or total:
                self._available[name] = available
            else:
                self._available.pop(name, None)

    def missing(self, request: ResourceSet) -> str:
        """For people: what keeps the request from being allocated, or '' if nothing does.

        What the node could never give comes first and alone; otherwise, what is not free at the moment.
        """
        never = [
            f"{_show(name, units)} asked, the node has {_show_bare(name, self._total.get(name, 0))} in all"
            if self._total.get(name, 0)
            else f"{_show(name, units)} asked, the node has none"
            for name, units in request.units.items()
            if self._total.get(name, 0) < units
        ]
        if never:
            return "; ".join(never)
        return "; ".join(
            f"{_show(name, units)} asked, {_show_bare(name, max(0, self._available.get(name, 0)))} "
            f"of {_show_bare(name, self._total[name])} free"
            for name, units in request.units.items()
            if self._available.get(name, 0) < units
        )


def _show_bare(name: str, units: int) -> str:
    if name == MEMORY and abs(units) >= UNITS_PER_ONE << 10:
        power = min((abs(units) // UNITS_PER_ONE).bit_length() - 1, 60) // 10
        return f"{units / UNITS_PER_ONE / 1024**power:.4g} {'KMGTPE'[power - 1]}iB"
    return f"{units / UNITS_PER_ONE:.12g}" + (" B" if name == MEMORY else "")


def _show(name: str, units: int) -> str:
    return f"{_show_bare(name, units)} {name}"
