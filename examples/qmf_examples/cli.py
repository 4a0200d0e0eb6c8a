"""The `qmf-fusion` command: what every subcommand shares. Nothing here imports torch, so that help comes at once."""

import io
import os
import sys
from collections.abc import Sequence

from .commands.version import package_version
from .errors import EXTRAS, CommandError, ResumableError, missing_extra


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the console script's entry point.

    Args:
        arguments: in place of ``sys.argv[1:]``.

    Returns:
        The exit code: 0, 1 for what the machine lacks, 2 for a wrong argument, 130 for an interrupt. Errors are one
        line on standard error.
    """
    _print_anything()
    if (sys.argv[1:] if arguments is None else list(arguments)) == ["--version"]:
        print(f"qmf-fusion {package_version()}")  # without the extra too
        return 0
    try:
        # Outside of this block nothing of the extra is needed, so that its absence can be told in one line too.
        from .commands import app as commands
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        return _fail(str(missing_extra(EXTRAS[error.name])), 1)
    try:
        return commands.run(arguments)
    except commands.UsageError as error:
        return _fail(" ".join(error.format_message().split()), error.exit_code)
    except CommandError as error:
        return _fail(str(error), 1)
    except ResumableError as error:
        return _fail(str(error), 130)
    except (KeyboardInterrupt, commands.Abort):
        return _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader of a pipe has gone; a closed standard output keeps Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _print_anything() -> None:
    """Print what the terminal has no characters for as escapes, such as names of files that are not UTF-8."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not where a notebook has put a stream of its own
            stream.reconfigure(errors="backslashreplace")


def _fail(message: str, code: int) -> int:
    if message:  # else another process has said it
        print(f"qmf-fusion: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
