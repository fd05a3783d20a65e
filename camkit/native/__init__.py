"""Compiled C++ and CUDA code, built on first use if a compiler is available."""

from camkit.native.loader import load as load
