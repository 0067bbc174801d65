"""`dsel methods`: what there is to choose from, and the card of one method."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from ..core.cards import aligned, get_method_card, list_cards, methods_table, put_methods_table, survey_table
from . import COMMANDS


def describe_methods(words: Sequence[str]) -> str:
    """
    Runs `dsel methods [NAME] [--json | --survey | --markdown [FILE]]`.

    Args:
        words (`Sequence[str]`):
            The words after `dsel methods`.

    Returns:
        `str`: what is to be printed.

    Raises:
        `ValueError`: for an unknown word or method, or a file without the markers of the table.
        `OSError`: if that file cannot be read or written.
    """
    asked, unknown = _parser().parse_known_args(list(words))
    if unknown:
        raise ValueError(f"Unexpected word {unknown[0]!r}. See `dsel methods --help`.")
    if asked.name and (asked.survey or asked.markdown is not None):
        option = "--survey" if asked.survey else "--markdown"
        raise ValueError(f"{option} is a table of all methods: leave out {asked.name!r}.")
    if asked.survey:
        return survey_table()
    if asked.markdown is not None:
        return _renew(Path(asked.markdown)) if asked.markdown else methods_table()
    cards = [get_method_card(asked.name)] if asked.name else list_cards()
    if asked.json:
        return json.dumps([card.as_dict() for card in cards], indent=2)
    if asked.name:
        return str(cards[0])
    return aligned([(c.name, ",".join(c.trainers), ",".join(c.hooks) or "-", c.summary) for c in cards])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dsel methods", description=COMMANDS["methods"], allow_abbrev=False)
    parser.add_argument("name", nargs="?", help="print the card of this method")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print as JSON")
    form.add_argument("--survey", action="store_true", help="print family, criterion and selector of each method")
    form.add_argument(
        "--markdown",
        nargs="?",
        const="",
        metavar="FILE",
        help="print the built-in methods as Markdown; with FILE, put that between the file's markers",
    )
    return parser


def _renew(file: Path) -> str:
    old = file.read_text(encoding="utf-8")
    new = put_methods_table(old)
    if new == old:
        return f"{file} is up to date"
    file.write_text(new, encoding="utf-8")
    return f"{file}: the table of methods was made anew"
