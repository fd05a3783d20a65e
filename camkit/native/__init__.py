"""Compiled code without torch in it, built on first use where a compiler is there."""

from camkit.native.library import load as load
