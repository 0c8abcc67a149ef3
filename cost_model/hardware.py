"""The record of what one device can do. Units stand in the field names; a figure that is not known is absent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal

Vendor = Literal["nvidia", "amd", "cpu"]

# A device without matrix units for a type runs it at the rate of the type named here; float64 is slower still, and rarely tabled.
_WIDER = MappingProxyType(
    {"float8": "float16", "bfloat16": "float32", "float16": "float32", "tf32": "float32", "float64": "float32"}
)
# Shares of the datasheet that a large kernel sustains, for devices on which nobody measured: matrix units throttle on random
# data, and DRAM refreshes and turns around.
_SUSTAINED_MATMUL = MappingProxyType({"nvidia": 0.8, "amd": 0.55, "cpu": 0.8})
_SUSTAINED_BANDWIDTH = 0.9


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device. Rates are dense; datasheet figures stand beside measured ones.

    Attributes:
        name: kebab-case name of the profile.
        arch: what the kernel compiler targets: sm_90, gfx942, or a CPU's machine name.
        sms: streaming multiprocessors, compute units or cores.
        matmul_tflops: peak TFLOP/s of matrix multiplication by type name: bfloat16, float16, float32, tf32, float8.
        measured_matmul_tflops: what large matrix multiplications sustain on random data, by type name, where they were measured.
        measured_bandwidth_gb_s: what a large copy sustains, counting reads and writes.
        exp_per_clock_sm: exponentials that one SM issues each clock.
        launch_us: from one kernel's end to the next one's start, in a stream.
        sources: for each figure, where it comes from.
        device_pattern: regular expression that the whole device name matches, without its vendor's brand.
        generic: whether the figures were derived from a relative's for want of a profile.
    """

    name: str
    vendor: Vendor
    arch: str
    sms: int
    clock_mhz: float
    matmul_tflops: Mapping[str, float]
    measured_matmul_tflops: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    memory_gb: float
    bandwidth_gb_s: float
    measured_bandwidth_gb_s: float | None = None
    l2_mb: float
    smem_sm_kb: int
    smem_block_kb: int
    exp_per_clock_sm: float = 16
    launch_us: float
    sources: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    device_pattern: str = ""
    generic: bool = False

    @property
    def sustained_bandwidth_gb_s(self) -> float:
        """GB/s of main memory that a streaming kernel can count on."""
        return self.measured_bandwidth_gb_s or self.bandwidth_gb_s * _SUSTAINED_BANDWIDTH

    @property
    def sustained_exp_per_s(self) -> float:
        """Exponentials a second over the whole device."""
        return self.sms * self.exp_per_clock_sm * self.clock_mhz * 1e6

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON-ready values."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Hardware:
        """Read what `to_dict` wrote.

        Raises:
            TypeError: a field is missing, or there is none of that name.
        """
        frozen: dict[str, Any] = {
            name: MappingProxyType(value) if isinstance(value, dict) else value for name, value in values.items()
        }
        return Hardware(**frozen)

    def sustained_matmul_tflops(self, dtype: Any) -> float:
        """TFLOP/s that large matrix multiplications in `dtype` (a torch.dtype or a key of `matmul_tflops`) sustain.

        Where a type was not measured, bfloat16's share of the datasheet is taken to hold for it, since it is power that limits it.
        """
        name = self._multiplied_as(dtype)
        return self.measured_matmul_tflops.get(name) or self.matmul_tflops[name] * self._sustained_share()

    def peak_matmul_tflops(self, dtype: Any) -> float:
        """TFLOP/s of the datasheet for `dtype`, or for the next wider type that the device has units for.

        Raises:
            ValueError: `dtype` is no floating-point type.
        """
        return self.matmul_tflops[self._multiplied_as(dtype)]

    def _multiplied_as(self, dtype: Any) -> str:
        name = type_name(dtype)
        while name not in self.matmul_tflops:
            name = _WIDER[name]
        return name

    def _sustained_share(self) -> float:
        peak, measured = (rates.get("bfloat16") for rates in (self.matmul_tflops, self.measured_matmul_tflops))
        return measured / peak if measured and peak else _SUSTAINED_MATMUL[self.vendor]


def type_name(dtype: Any) -> str:
    """The name under which `Hardware` lists a type: `torch.float8_e4m3fn` is "float8".

    Raises:
        ValueError: `dtype` is no floating-point type.
    """
    name = str(dtype).removeprefix("torch.")
    if name.startswith("float8"):
        return "float8"
    if name in ("bfloat16", "float16", "float32", "tf32", "float64"):
        return name
    raise ValueError(f"Expected a floating-point dtype but got dtype={dtype!r}")
