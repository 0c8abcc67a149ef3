"""The devices that are known. A new GPU is one entry in `PROFILES`."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from .hardware import Hardware, Vendor

_DATASHEET = "vendor's datasheet or architecture white paper"
_GEMM = "large bfloat16 matrix multiplication, random data"
_COPY = "large device-to-device copy"
_LAUNCH_H200 = "empty kernels in a stream on an H200"


def _profile(
    *,
    name: str,
    vendor: Vendor = "nvidia",
    measured_bfloat16_tflops: float | None = None,
    measured_bandwidth_gb_s: float | None = None,
    launch_source: str = f"assumed: {_LAUNCH_H200}",
    **figures: Any,
) -> Hardware:
    """A record with the source of every figure: the datasheet, except where a parameter says otherwise."""
    sources = dict.fromkeys((key for key in figures if key not in ("arch", "device_pattern")), _DATASHEET)
    sources["launch_us"] = launch_source
    sources["exp_per_clock_sm"] = _DATASHEET
    if measured_bfloat16_tflops is not None:
        sources["measured_matmul_tflops"] = _GEMM
    if measured_bandwidth_gb_s is not None:
        sources["measured_bandwidth_gb_s"] = _COPY
    return Hardware(
        name=name,
        vendor=vendor,
        measured_matmul_tflops=MappingProxyType({} if measured_bfloat16_tflops is None else {"bfloat16": measured_bfloat16_tflops}),
        measured_bandwidth_gb_s=measured_bandwidth_gb_s,
        launch_us=2.5,
        sources=MappingProxyType(dict(sorted(sources.items()))),
        **{**figures, "matmul_tflops": MappingProxyType(figures["matmul_tflops"])},
    )


def _rates(float16: float, *, float32: float, **others: float) -> dict[str, float]:
    """TFLOP/s by type, on devices that multiply bfloat16 as fast as float16."""
    return {"float16": float16, "bfloat16": float16, "float32": float32, **others}


_A100: dict[str, Any] = {
    "arch": "sm_80",
    "sms": 108,
    "clock_mhz": 1410,
    "matmul_tflops": _rates(312, tf32=156, float32=19.5),
    "measured_bfloat16_tflops": 271,
    "l2_mb": 40,
    "smem_sm_kb": 164,
    "smem_block_kb": 163,
}
_HOPPER_SXM: dict[str, Any] = {
    "arch": "sm_90",
    "sms": 132,
    "clock_mhz": 1830,
    "matmul_tflops": _rates(989, tf32=494.5, float32=67, float8=1979),
    "l2_mb": 50,
    "smem_sm_kb": 228,
    "smem_block_kb": 227,
}
_SMALL_SMEM: dict[str, Any] = {"smem_sm_kb": 100, "smem_block_kb": 99}

PROFILES: tuple[Hardware, ...] = (
    _profile(name="a100-sxm-40", **_A100, memory_gb=40, bandwidth_gb_s=1555, device_pattern=r"A100-SXM4?-40GB"),
    _profile(name="a100-sxm-80", **_A100, memory_gb=80, bandwidth_gb_s=2039, device_pattern=r"A100-SXM4?-80GB"),
    _profile(
        name="h100-sxm",
        **_HOPPER_SXM,
        measured_bfloat16_tflops=794,
        memory_gb=80,
        bandwidth_gb_s=3350,
        measured_bandwidth_gb_s=3000,
        device_pattern=r"H100( SXM5?)?( 80GB)?( HBM3)?",
    ),
    _profile(
        name="h100-pcie",
        arch="sm_90",
        sms=114,
        clock_mhz=1755,
        matmul_tflops=_rates(756, tf32=378, float32=51, float8=1513),
        memory_gb=80,
        bandwidth_gb_s=2039,
        l2_mb=50,
        smem_sm_kb=228,
        smem_block_kb=227,
        device_pattern=r"H100 PCIe",
    ),
    _profile(
        name="h200",
        **_HOPPER_SXM,
        measured_bfloat16_tflops=790,
        memory_gb=141,
        bandwidth_gb_s=4800,
        measured_bandwidth_gb_s=4300,
        launch_source=_LAUNCH_H200,
        device_pattern=r"H200",
    ),
    _profile(
        name="b200",
        arch="sm_100",
        sms=148,
        clock_mhz=1965,
        matmul_tflops=_rates(2250, tf32=1125, float32=80, float8=4500),
        measured_bfloat16_tflops=1745,
        memory_gb=180,
        bandwidth_gb_s=8000,
        l2_mb=126,
        smem_sm_kb=228,
        smem_block_kb=227,
        device_pattern=r"B200",
    ),
    _profile(
        name="rtx-3090",
        arch="sm_86",
        sms=82,
        clock_mhz=1695,
        matmul_tflops=_rates(71, tf32=35.6, float32=35.6),  # float32 accumulators; half that of float16 ones
        memory_gb=24,
        bandwidth_gb_s=936,
        l2_mb=6,
        **_SMALL_SMEM,
        device_pattern=r"RTX 3090",
    ),
    _profile(
        name="rtx-4090",
        arch="sm_89",
        sms=128,
        clock_mhz=2520,
        matmul_tflops=_rates(165, tf32=82.6, float32=82.6, float8=330),  # float32 accumulators
        memory_gb=24,
        bandwidth_gb_s=1008,
        l2_mb=72,
        **_SMALL_SMEM,
        device_pattern=r"RTX 4090",
    ),
    _profile(
        name="rtx-5090",
        arch="sm_120",
        sms=170,
        clock_mhz=2407,
        matmul_tflops=_rates(209.5, tf32=104.8, float32=104.8, float8=419),  # float32 accumulators
        memory_gb=32,
        bandwidth_gb_s=1792,
        l2_mb=96,
        **_SMALL_SMEM,
        device_pattern=r"RTX 5090",
    ),
    _profile(
        name="l4",
        arch="sm_89",
        sms=58,
        clock_mhz=2040,
        matmul_tflops=_rates(121, tf32=60, float32=30.3, float8=242),
        memory_gb=24,
        bandwidth_gb_s=300,
        l2_mb=48,
        **_SMALL_SMEM,
        device_pattern=r"L4",
    ),
    _profile(
        name="l40s",
        arch="sm_89",
        sms=142,
        clock_mhz=2520,
        matmul_tflops=_rates(362, tf32=183, float32=91.6, float8=733),
        memory_gb=48,
        bandwidth_gb_s=864,
        l2_mb=96,
        **_SMALL_SMEM,
        device_pattern=r"L40S",
    ),
    _profile(
        name="t4",
        arch="sm_75",
        sms=40,
        clock_mhz=1590,
        matmul_tflops={"float16": 65, "float32": 8.1},
        memory_gb=16,
        bandwidth_gb_s=320,
        l2_mb=4,
        smem_sm_kb=64,
        smem_block_kb=64,
        device_pattern=r"T4",
    ),
    _profile(
        name="mi300x",
        vendor="amd",
        arch="gfx942",
        sms=304,
        clock_mhz=2100,
        matmul_tflops=_rates(1307, tf32=654, float32=163, float8=2615),
        measured_bfloat16_tflops=668,
        memory_gb=192,
        bandwidth_gb_s=5300,
        measured_bandwidth_gb_s=4100,
        l2_mb=32,  # eight of 4 MB; the 256 MB behind them are shared
        smem_sm_kb=64,
        smem_block_kb=64,
        device_pattern=r"MI300X( VF)?",
    ),
    _profile(
        name="mi355x",
        vendor="amd",
        arch="gfx950",
        sms=256,
        clock_mhz=2400,
        matmul_tflops=_rates(2517, float32=157, float8=5000),
        measured_bfloat16_tflops=1565,
        memory_gb=288,
        bandwidth_gb_s=8000,
        l2_mb=32,
        smem_sm_kb=160,
        smem_block_kb=160,
        device_pattern=r"MI355X( VF)?",
    ),
)
