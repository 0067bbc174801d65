"""
The command line: `dsel COMMAND ...`, the same program as `python -m dsel_trl`.

Exit codes: 0 done, 1 the training failed, 2 something in the arguments or the data has to be mended, 130 interrupted.
"""

import difflib
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from .commands import COMMANDS, TRAININGS

DONE, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 130
# Commands that take their words and give what is to be printed: module and function. They are loaded when they are
# asked for, so that a mistyped word need not wait for the trainers.
WORDS = {
    "build": ("build", "build_file"),
    "shards": ("shards", "plan_text"),
    "methods": ("methods", "describe_methods"),
    "ablate": ("ablate", "run_ablation"),
    "score": ("score", "score_dataset"),
    "report": ("report", "report_runs"),
    "export": ("export", "export_run"),
    "recipe": ("recipe", "print_recipe"),
    "audit": ("audit", "audit_file"),
    "value": ("value", "value_dataset"),
}
USAGE = """usage: dsel COMMAND [arguments]

{commands}

  dsel dpo --config recipe.yaml [--key value ...]    all of TRL's keys, and `selection:` in the YAML file
  dsel methods margin                                what a method does, needs and costs

`dsel COMMAND --help` lists its arguments; `--debug` (or DSEL_DEBUG=1) shows tracebacks.
`accelerate launch -m dsel_trl COMMAND ...` runs the same on several devices."""


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _say(text: str, stream: Any = None) -> None:
    if _is_first_process():
        print(text, file=stream or sys.stdout, flush=True)


def _one_line(error: BaseException) -> str:
    """The error as one printable line: what comes out of a dataset cannot steer the terminal."""
    # `KeyError` shows the repr of its argument; the others show their message.
    text = f"missing key {error}" if isinstance(error, KeyError) else str(error)
    line = " ".join(text.split()) or type(error).__name__
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)


def _set_up_logging() -> None:
    """Our lines on standard error; other processes than the first are silent."""
    logger = logging.getLogger("dsel_trl")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("dsel: %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.INFO if _is_first_process() else logging.ERROR)
    if not _is_first_process():
        import datasets
        import transformers

        datasets.disable_progress_bars()
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()


def _train(kind: str, words: Sequence[str]) -> None:
    if "-h" in words or "--help" in words:
        from .commands.arguments import make_parser

        _say(make_parser(kind).format_help())
        return
    # Imported here: reading `dsel methods` or a mistyped key should not wait for the trainers.
    from .commands.arguments import check_arguments, parse_arguments

    _set_up_logging()
    arguments = parse_arguments(kind, words)
    check_arguments(arguments)
    for note in arguments.notes:
        logging.getLogger(__name__).info(note)
    if arguments.stages is not None:
        from .commands.stages import run_stages

        _say(run_stages(arguments))
        return
    from .commands.train import prepare, run_single

    run_single(prepare(arguments))


def _dispatch(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        _say(USAGE.format(commands="\n".join(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items())))
        return
    command, rest = words[0], words[1:]
    if command == "--version":
        from importlib.metadata import version

        _say(f"dsel-trl {version('dsel-trl')}")
    elif command in TRAININGS:
        _train(command, rest)
    elif command in WORDS:
        module, function = WORDS[command]
        _set_up_logging()
        _say(getattr(importlib.import_module(f".commands.{module}", __package__), function)(rest))
    else:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"Unknown command {command!r}.{hint} There are {', '.join(COMMANDS)}.")


def _without_debug(words: Sequence[str]) -> tuple[list[str], bool]:
    """Takes `--debug` out; followed by a value it is the option of transformers and stays."""
    kept, debug = [], False
    for position, word in enumerate(words):
        following = words[position + 1] if position + 1 < len(words) else "-"
        if word == "--debug" and (following.startswith("-") or following in COMMANDS):
            debug = True
        else:
            kept.append(word)
    return kept, debug


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs `dsel`.

    Args:
        argv (`Sequence[str]`, *optional*):
            The words after the program's name. Defaults to those of this process.

    Returns:
        `int`: the exit code.
    """
    words, debug = _without_debug(sys.argv[1:] if argv is None else argv)
    debug = debug or os.environ.get("DSEL_DEBUG", "") not in ("", "0")
    try:
        _dispatch(words)
    except KeyboardInterrupt:
        _say("dsel: interrupted", sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # `dsel methods | head`: the reader has seen enough. What is left must not be flushed into the pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except SystemExit as leaving:
        # argparse's `--help`.
        return int(leaving.code or DONE)
    except Exception as error:
        return _report(error, debug)
    return DONE


def _report(error: Exception, debug: bool) -> int:
    """One line about what went wrong; returns the exit code."""
    if debug:
        _say("".join(traceback.format_exception(error)), sys.stderr)
    # By name, so that a mistyped command does not import the trainers to be told so.
    failed = type(error).__name__ == "TrainingFailed"
    mistake = isinstance(error, ValueError | TypeError | KeyError | OSError | ImportError | NotImplementedError)
    cause = error.__cause__ if failed and error.__cause__ is not None else error
    if mistake:
        _say(f"dsel: error: {_one_line(error)}", sys.stderr)
        return MISTAKE
    hint = "" if debug else " (--debug shows the traceback)"
    # A mistake is the same everywhere, and the first process tells it; any process can fail alone.
    who = "dsel" if _is_first_process() else f"dsel, process {os.environ['RANK']}"
    what = "training failed" if failed else "failed"
    print(f"{who}: {what}: {type(cause).__name__}: {_one_line(cause)}{hint}", file=sys.stderr, flush=True)
    return FAILED


if __name__ == "__main__":
    sys.exit(main())
