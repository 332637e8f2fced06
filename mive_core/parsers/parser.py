"""A parser that raises UserError, and the types of its arguments."""

import argparse
import math
import re

from ..errors import UserError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError for bad arguments.

    `nested` are commands beside its own positional argument, which argparse's subparsers do not allow: they take over where the first argument names one.
    """

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)
        self.nested: dict[str, Parser] = {}

    def parse_known_args(self, args=None, namespace=None):
        if args and args[0] in self.nested:
            return self.nested[args[0]].parse_known_args(args[1:], namespace)
        return super().parse_known_args(args, namespace)

    def add_nested(self, name: str, run, summary: str, details: str = "") -> "Parser":
        """Adds a nested command that calls run(arguments), and names it at the end of this parser's --help."""
        parser = Parser(prog=f"{self.prog} {name}", description=sentence(summary, details))
        parser.set_defaults(run=run)
        self.nested[name] = parser
        self.formatter_class = argparse.RawDescriptionHelpFormatter
        self.epilog = f"{self.epilog or 'further commands:'}\n  {self.prog} {name:<11}{summary}"
        return parser

    def error(self, message: str):
        raise UserError(message, fix=f"`{self.prog} --help` lists what it takes")


class StoreOnce(argparse.Action):
    """Stores an option's value; an error if the option is given twice."""

    def __call__(self, parser, namespace, value, option_string=None):
        if getattr(namespace, self.dest) is not None:
            parser.error(f"argument {option_string}: given more than once")
        setattr(namespace, self.dest, value)


def add_command(commands, name: str, run, summary: str, details: str = "") -> Parser:
    """Adds a command that calls run(arguments). Its --help shows summary and details, the list of commands only the summary."""
    parser = commands.add_parser(name, help=summary, description=sentence(summary, details))
    parser.set_defaults(run=run)
    return parser


def add_group(commands, name: str, summary: str, title: str, details: str = ""):
    """Adds a command that has commands of its own, under that title in its --help -> what these are added to."""
    parser = commands.add_parser(name, help=summary, description=sentence(summary, details))
    return parser.add_subparsers(required=True, title=title, metavar="WHAT", parser_class=Parser)


def sentence(summary: str, details: str = "") -> str:
    return f"{summary[0].upper()}{summary[1:]}. {details}".strip()


def text(value: str) -> str:
    """Argument type: text that can be written as UTF-8."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"not valid Unicode: a lone surrogate at character {error.start}") from None
    return value


def positive_int(value: str) -> int:
    """Argument type: a whole number of 1 or more."""
    number = integer(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {value}; expected 1 or more")
    return number


def integer(value: str) -> int:
    """Argument type: a whole number of at most 18 digits."""
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", value):
        raise argparse.ArgumentTypeError(f"got {value[:40]!r}; expected a whole number")
    return int(value)


def finite_float(value: str) -> float:
    """Argument type: a number, but not NaN or infinity."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"got {value[:40]!r}; expected a finite number")
    return number


def positive_float(value: str) -> float:
    """Argument type: a finite number above 0."""
    number = finite_float(value)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"got {value}; expected more than 0")
    return number


def lora(value: str) -> tuple[str, float]:
    """Argument type: FILE or FILE:STRENGTH -> (path, strength)."""
    match = re.fullmatch(r"(.+):([+-]?[0-9.]+(?:e[+-]?[0-9]+)?)", value)
    return (text(match[1]), finite_float(match[2])) if match else (text(value), 1.0)


def keyframe(value: str) -> tuple[int, str]:
    """Argument type: NUMBER:IMAGE -> (number, path)."""
    match = re.fullmatch(r"([0-9]{1,9}):(.+)", value)
    if not match:
        raise argparse.ArgumentTypeError(f"got {value[:80]!r}; expected the frame's number and an image, such as 40:frame40.png")
    return int(match[1]), text(match[2])


def size(value: str) -> tuple[int, int]:
    """Argument type: WIDTHxHEIGHT -> (width, height)."""
    match = re.fullmatch(r"([0-9]{1,6})[xX]([0-9]{1,6})", value)
    if not match:
        raise argparse.ArgumentTypeError(f"got {value[:40]!r}; expected WIDTHxHEIGHT, such as 192x112")
    return int(match[1]), int(match[2])


def bucket(value: str) -> tuple[int, int, int]:
    """Argument type: WIDTHxHEIGHTxFRAMES with sides that are multiples of 16 and 4n+1 frames -> (width, height, frames)."""
    match = re.fullmatch(r"([0-9]{1,6})[xX]([0-9]{1,6})[xX]([0-9]{1,6})", value)
    if not match:
        raise argparse.ArgumentTypeError(f"got {value[:40]!r}; expected WIDTHxHEIGHTxFRAMES, such as 832x480x81")
    width, height, frames = (int(part) for part in match.groups())
    if width % 16 or height % 16 or frames % 4 != 1 or not width or not height:
        raise argparse.ArgumentTypeError(f"got {value}; expected sides that are multiples of 16 and 4n+1 frames")
    return width, height, frames
