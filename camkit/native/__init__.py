"""Compiled code without torch in it, built on first use where a compiler is there."""

from camkit.native.loader import load as load
