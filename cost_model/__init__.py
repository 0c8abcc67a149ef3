"""What the hardware can do, and which candidate it does fastest."""

if __name__ != "effcompile.cost_model":
    raise ImportError(f"Expected import effcompile.cost_model but got import {__name__}: use the package's full name")
