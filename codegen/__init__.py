"""Generators: one file a kernel family, from specification to readable source."""

if __name__ != "effcompile.codegen":
    raise ImportError(f"Expected import effcompile.codegen but got import {__name__}: use the package's full name")
