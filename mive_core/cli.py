"""The command-line interface. Bad input is reported as one line on stderr, with exit code 2."""

import argparse
import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from . import __version__
from .errors import UserError
from .parsers.bench import add_bench, add_study
from .parsers.data import add_data
from .parsers.models import add_conversions, add_demo, add_distill, add_edit, add_eval, add_inspect, add_judge, add_merge, add_train
from .parsers.parser import Parser
from .parsers.preference import add_preference

DESCRIPTION = """\
MiVE edits a video from an instruction and one edited frame: you edit the video's first frame,
and MiVE carries that edit through all frames, while the motion and everything else stay the same."""
EXAMPLES = """\
first steps:
  mive demo    edits two sample clips with the embedded models, on any machine, without a download
  mive edit --source clip.mp4 --reference first_frame_edited.png --instruction "make it night" --output edited.mp4

`mive COMMAND --help` explains each command."""


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0, 2 for bad input and where memory runs out, 130 for an interrupt."""
    argv = sys.argv[1:] if argv is None else argv
    quiet_libraries()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *_, **__: _print_message("warning", message)
        try:
            with closed_streams():
                arguments = build_parser().parse_args(argv)
                check_processes(arguments)
                arguments.command_line = shlex.join(["mive", *argv])
                arguments.run(arguments)
        except UserError as error:
            _print_message("error", error)
            return 2
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            _print_message("error", f"out of memory ({error or type(error).__name__}); take fewer frames, a smaller --size or --dtype bf16")
            return 2
        except KeyboardInterrupt:
            _print_message("error", "interrupted")
            return 130
    return 0


def check_processes(arguments: argparse.Namespace) -> None:
    """Raises UserError where torchrun or `accelerate launch` has started several processes of a command that does not share its work."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count > 1 and arguments.alone and not getattr(arguments, "sequence_parallel", False):
        raise UserError("each process would write the same files", got=f"{count} processes", fix=arguments.alone)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, of the machine or of a card. torch tells the former by its message only."""
    messages = ("can't allocate memory", "Cannot allocate memory", "bad_alloc")
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or any(message in str(error) for message in messages)


@contextmanager
def closed_streams() -> Iterator[None]:
    """Lets a command end quietly where nobody reads its output: stdout or stderr closed from the start, or a pipe whose reader has gone."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its end


def quiet_libraries() -> None:
    """Sets defaults for model libraries that are imported later: no network, no output on stderr. The user's environment takes precedence."""
    for name, value in (("HF_HUB_OFFLINE", "1"), ("HF_HUB_DISABLE_PROGRESS_BARS", "1"), ("TRANSFORMERS_VERBOSITY", "error"), ("DIFFUSERS_VERBOSITY", "error")):
        os.environ.setdefault(name, value)


def build_parser() -> Parser:
    """Builds the parser of all commands. Imports neither torch nor numpy, so that --help is fast."""
    parser = Parser(prog="mive", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"mive {__version__}")
    parser.set_defaults(alone="start one process")  # what several processes of a command are told; None: they share its work
    commands = parser.add_subparsers(required=True, title="commands", metavar="COMMAND", parser_class=Parser)
    add_edit(commands)
    add_demo(commands)
    add_eval(commands)
    add_judge(commands)
    add_train(commands)
    add_distill(commands)
    add_inspect(commands)
    add_conversions(commands)
    add_merge(commands)
    add_data(commands)
    add_preference(commands)
    add_bench(commands)
    add_study(commands, main)
    return parser


def _print_message(kind: str, message: object) -> None:
    """Writes "mive: KIND: message" to stderr, as one line."""
    sys.stderr.write(f"mive: {kind}: {' '.join(str(message).split())}\n")
