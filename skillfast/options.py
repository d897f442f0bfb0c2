"""Options of the command line, made from the fields of settings; each is given once. Imports no torch."""

from __future__ import annotations

import functools
import warnings
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import click

from skillfast.errors import ArgumentError, DataError, NotComparableError, SkillfastError
from skillfast.settings import name_of, range_of, type_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from dataclasses import Field

    Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class Failure(click.ClickException):
    """One line on stderr; exit code 2 for a wrong argument, 4 for what cannot be compared, 1 for a failed run."""

    def __init__(self, error: SkillfastError) -> None:
        super().__init__(str(error))
        codes = {ArgumentError: 2, NotComparableError: 4}
        self.exit_code = next((code for kind, code in codes.items() if isinstance(error, kind)), 1)  # type: ignore[misc]


class Numbers(click.ParamType):
    """Several numbers: `0.5,0.4,0.3`, or with spaces as in timm: `0.5 0.4 0.3`."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The numbers as a tuple."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in str(value).replace(",", " ").split())
        except ValueError:
            self.fail(f"expected numbers such as 0.49 0.48 0.45, got {value!r}", param, ctx)


class Names(click.ParamType):
    """Several words with commas between them: `mlp,attn`."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ARG002
        """The words as a tuple."""
        return value if isinstance(value, tuple) else tuple(part for part in str(value).split(",") if part)


class Command(click.Command):
    """A command whose options are given once, and whose failures are told in one line."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse repeated options and join numbers, then parse."""
        try:
            return super().parse_args(ctx, list(_given_once(self.params, args)))
        except ArgumentError as error:
            raise Failure(error) from error

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; warnings and errors of skillfast are lines for the user."""
        with warnings.catch_warnings():
            # Ours are for the user, in one line; other libraries' are for their developers.
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", module=r"skillfast(\.|$)")
            warnings.showwarning = lambda message, *_: click.echo(f"warning: {message}", err=True)
            try:
                return super().invoke(ctx)
            except SkillfastError as error:
                raise Failure(error) from error
            except OSError as error:
                if error.filename is None:  # of no file
                    raise
                raise Failure(
                    DataError(
                        f"{error.filename}: expected a file that can be read or written, got {error.strerror}; "
                        "check it and its folder"
                    )
                ) from error


def _given_once(params: Iterable[click.Parameter], args: list[str]) -> Iterator[str]:
    """The arguments, numbers in timm's spelling joined: `--mean 0.5 0.4` becomes `--mean 0.5,0.4`.

    Raises:
        ArgumentError: An option that is given twice and takes no list that way.
    """
    known = {
        spelling: param
        for param in params
        if isinstance(param, click.Option)
        for spelling in (*param.opts, *param.secondary_opts)
    }
    seen: set[str] = set()
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        spelling, equals, _ = arg.partition("=")
        if arg == "--":
            yield from (arg, *rest)
            return
        param = known.get(spelling)
        if param is None:
            yield arg
            continue
        if param.name in seen and not param.multiple:
            raise ArgumentError(f"{spelling}: expected once, got twice; {_how(param)}")
        seen.add(str(param.name))
        yield arg
        if param.is_flag or equals or not rest:
            continue
        value = rest.pop(0)
        while isinstance(param.type, Numbers) and rest and _is_number(rest[0]):
            value += f",{rest.pop(0)}"
        yield value


def _how(param: click.Option) -> str:
    """How an option is given that was given twice."""
    if isinstance(param.type, Numbers):
        return f"give all its numbers at once, as {param.opts[0]} 0.49 0.48 0.45"
    if isinstance(param.type, Names):
        return f"give all its names at once, with commas, as {param.opts[0]} a,b"
    return "leave one of them out"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def options(*decorators: Decorator) -> Decorator:
    """Several options as one decorator, in the order in which the help shows them."""

    def apply(command: Callable[..., Any]) -> Callable[..., Any]:
        return functools.reduce(lambda wrapped, option: option(wrapped), reversed(decorators), command)

    return apply


def options_of(group: type, *, only: Iterable[str] = (), but: Iterable[str] = (), **defaults: Any) -> Decorator:
    """Options for the fields of a class of settings, named as its flat settings are.

    Args:
        group: The class.
        only: Names of the settings to take; all by default.
        but: Names of settings to leave out.
        **defaults: Other defaults than the fields', for this command.
    """
    wanted = [f for f in fields(group) if name_of(f) not in but and (not only or name_of(f) in only)]
    return options(*(_option(group, declared, defaults) for declared in wanted))


def _option(group: type, declared: Field[Any], defaults: dict[str, Any]) -> Decorator:
    kind, item, _ = type_of(group, declared)
    name, rules = name_of(declared), declared.metadata
    option = "--" + (rules["option"] or name.replace("_", "-"))
    within = range_of(declared)
    attributes: dict[str, Any] = {"help": rules["help"].rstrip(".") + (f", {within}." if within else ".")}
    if rules["metavar"]:
        attributes["metavar"] = rules["metavar"]
    if kind is dict:
        return click.option(option, name, multiple=True, **attributes)
    default = defaults.get(name, declared.default)
    if kind is bool:
        return click.option(f"{option}/--no-{option[2:]}", name, default=default, **attributes)
    if kind is tuple:
        attributes["type"] = Numbers() if item is float else Names()
        default = None if default is None else ",".join(f"{part:g}" if item is float else part for part in default)
    elif rules["choices"] and kind is str:
        attributes["type"] = click.Choice(rules["choices"])
    else:
        attributes["type"] = kind
        if rules["choices"]:
            attributes["metavar"] = f"[{'|'.join(map(str, rules['choices']))}]"
    return click.option(option, name, default=default, show_default=default not in (None, ""), **attributes)


__all__ = ["Command", "Failure", "Names", "Numbers", "options", "options_of"]
