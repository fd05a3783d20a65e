"""The command line; the commands `data`, `refine`, `mask` and `eval` need no model."""

import argparse
import sys
from collections.abc import Sequence

from camkit.cli import (
    bench,
    build_kernels,
    cam,
    data,
    demo,
    doctor,
    eval as evaluate,
    mask,
    refine,
    run,
)
from camkit.errors import CamkitError

COMMANDS = {
    "demo": demo,
    "cam": cam,
    "run": run,
    "bench": bench,
    "build-kernels": build_kernels,
    "data": data,
    "doctor": doctor,
    "refine": refine,
    "mask": mask,
    "eval": evaluate,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 on success, 1 after an error, 2 for a wrong command line.
    """
    parser = argparse.ArgumentParser(
        prog="camkit",
        description="Pixel masks from a pretrained Vision Transformer and image-level labels.",
        epilog="`camkit COMMAND --help` shows examples.",
    )
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").strip().splitlines()[0]
        command = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name in arguments[:1]:  # build the options of this command only
            module.add_arguments(command)
        command.set_defaults(execute=module.execute)
    options = parser.parse_args(arguments)
    try:
        return int(options.execute(options))
    except (CamkitError, ValueError, OSError) as error:
        print(f"camkit: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("camkit: interrupted; finished results are kept", file=sys.stderr)
        return 1
