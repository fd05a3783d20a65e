"""What setuptools does besides copying files: compile the C++, make links of the README absolute.

`[tool.setuptools.cmdclass]` in pyproject.toml names these commands. CAMKIT_BUILD in the environment
is "auto" (a wheel of sources alone if nothing can be compiled), "compiled" (an error instead) or
"pure".
"""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.egg_info import egg_info

_HERE = Path(__file__).parent
_COMPILED = "camkit/native/compiled"  # where `camkit.native.loader` looks


def _sources() -> Any:
    # by its path, because importing the package takes torch, which is not there
    spec = importlib.util.spec_from_file_location("camkit_sources", _HERE / "sources.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"{_HERE / 'sources.py'} is missing")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class PlatformWheel(bdist_wheel):  # type: ignore[misc] # setuptools has no types
    """A wheel for every Python of one platform, with compiled libraries that no Python is part of.

    Attributes:
        libraries: folder of the compiled files; None while nothing is compiled.
    """

    libraries: Path | None = None

    def run(self) -> None:
        choice = os.environ.get("CAMKIT_BUILD", "auto")
        if choice not in ("auto", "compiled", "pure"):
            raise SystemExit(f"CAMKIT_BUILD must be auto, compiled or pure, got {choice!r}")
        with tempfile.TemporaryDirectory() as folder:
            if choice == "pure":
                print("camkit: a wheel of sources alone, as CAMKIT_BUILD=pure asks")  # noqa: T201
            else:
                self._compile(Path(folder), required=choice == "compiled")
            super().run()

    def _compile(self, folder: Path, *, required: bool) -> None:
        try:
            compile_into(folder)
        except (OSError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", None) or b""
            reason = " ".join([str(error), *said.decode(errors="replace").split("\n")[:3]]).strip()
            if required:
                raise SystemExit(
                    f"CAMKIT_BUILD=compiled, but nothing was compiled: {reason}"
                ) from error
            print(  # noqa: T201
                f"camkit: a wheel of sources alone, because nothing could be compiled: {reason}; "
                "the dense CRF will be compiled at first use, or run in plain torch",
                file=sys.stderr,
            )
            return
        self.libraries = folder
        self.root_is_pure = False
        self.distribution.has_ext_modules = lambda: True

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.libraries is None else ("py3", "none", platform)

    def write_wheelfile(self, wheelfile_base: str, *arguments: Any, **options: Any) -> None:
        super().write_wheelfile(wheelfile_base, *arguments, **options)
        if self.libraries is not None:  # the last step before the folder is packed
            target = Path(self.bdist_dir) / _COMPILED
            target.mkdir(parents=True, exist_ok=True)
            for library in sorted(self.libraries.iterdir()):
                self.copy_file(str(library), str(target / library.name))


def compile_into(folder: Path) -> None:
    """Compile every source for all processors of this kind, and for those with AVX2.

    Raises:
        OSError, subprocess.SubprocessError: there is no compiler, or it failed.
    """
    sources = _sources()
    for source in sorted(_HERE.glob("*.cpp")):
        for wide in (False, True) if sources.has_wide() else (False,):
            target = folder / f"{sources.stem(source, wide=wide)}.so"
            command = sources.command(source, target, wide=wide)
            print("camkit:", " ".join(command), flush=True)  # noqa: T201
            subprocess.run(command, check=True, capture_output=True, timeout=sources.SECONDS)


class Metadata(egg_info):  # type: ignore[misc] # setuptools has no types
    """The metadata, with a README that can be read outside of the repository."""

    def finalize_options(self) -> None:
        super().finalize_options()
        metadata = self.distribution.metadata
        place = metadata.project_urls["Repository"], f"v{metadata.version}"
        metadata.long_description = with_absolute_links(metadata.long_description, *place)


def with_absolute_links(text: str, repository: str, tag: str) -> str:
    """Return Markdown whose links to files lead to a tag of a repository, and images to its files.

    >>> with_absolute_links("![a](b.jpg), [c](d.md#e), [f](#g)", "https://h.org", "v1")
    '![a](https://h.org/raw/v1/b.jpg), [c](https://h.org/blob/v1/d.md#e), [f](#g)'
    """
    relative = r"(?![a-z]+:|#)"
    text = re.sub(rf"(!\[[^\]]*\]\(){relative}", rf"\1{repository}/raw/{tag}/", text)
    return re.sub(rf"((?<!!)\[[^\]]*\]\(){relative}", rf"\1{repository}/blob/{tag}/", text)
