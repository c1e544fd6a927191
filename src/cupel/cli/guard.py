"""How every command ends: a message and an exit code, never a traceback on the user's screen."""

from __future__ import annotations

import functools
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import TypeVar

import typer

from cupel.core.errors import CupelError

R = TypeVar("R")

INTERRUPTED = 130


def guarded(command: Callable[..., R]) -> Callable[..., R]:
    """Turn errors into product exit codes: 2 for the user's input, 3 for a defect, 130 for Ctrl-C."""

    @functools.wraps(command)
    def run(*args: object, **kwargs: object) -> R:
        try:
            return command(*args, **kwargs)
        except CupelError as error:
            if error.exit_code == 3:
                _defect(error)
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt as stop:
            typer.echo("; ".join(["stopped", *map(str, stop.args)]), err=True)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # The reader of a pipe went away; leave without a second error at shutdown.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            _defect(error)
            raise typer.Exit(3) from None

    return run


def _defect(error: Exception) -> None:
    with tempfile.NamedTemporaryFile("w", prefix="cupel-", suffix=".txt", delete=False, encoding="utf-8") as file:
        traceback.print_exception(error, file=file)
    typer.echo(f"cupel failed: {type(error).__name__}: {error}\nThe traceback is in {file.name}", err=True)
