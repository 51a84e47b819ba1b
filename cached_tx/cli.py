"""Runs one command with its flags, and says in words what the user can mend."""

import json
import re
import sys
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags, logging

STOPPED = 143  # 128 + SIGTERM: what launchers take for "start me again"
_SPACE = " " * 6
_RULES = {  # what follows a flag and its value in a message of absl's: the rule
  r"invalid literal for int\(\).*": "it must be a whole number",
  r"could not convert string to float.*": "it must be a number",
  r"\('Non-boolean argument.*": "it must be true or false",
  r"value should be one of <(.*)>": "it must be one of {0}",
  r"Failed to parse .* as a ConfigDict.*": "it is a section: change one key of it",
  r"[-+.\w]+ is not (an? .*)": "it must be {0}",
}


class Command(NamedTuple):
  """One word of the command line.

  Attributes:
    help: one line.
    define: makes its flags, given where to put them and all arguments.
    run: does the work, given the parsed flags; returns the exit status.
  """

  help: str
  define: Callable[[flags.FlagValues, list[str]], None]
  run: Callable[[Any], int | None]


def config_flag(
  values: flags.FlagValues, argv: list[str], *, more: bool = False
) -> None:
  """--config, and a flag for each of its keys; with `more`, for keys it lacks too."""
  from ml_collections import config_flags

  text = "configs/FILE.py[:variant]; change a key with --config.model.width=256"
  config_flags.DEFINE_config_file(
    "config",
    None,
    text,
    flag_values=values,
    sys_argv=argv,
    lock_config=not more,
    accept_new_attributes=more,
  )


def workdir_flag(values: flags.FlagValues, text: str = "folder of the run") -> None:
  """--workdir."""
  flags.DEFINE_string("workdir", None, text, flag_values=values)


def json_flag(values: flags.FlagValues) -> None:
  """--json, for `show`."""
  flags.DEFINE_string("json", None, "also write a JSON file", flag_values=values)


def required(values: flags.FlagValues, *names: str) -> None:
  """Raises ValueError for the first of these flags that was not given."""
  for name in names:
    if getattr(values, name) is None:
      raise ValueError(f"--{name} is required")


def process_flags(values: flags.FlagValues) -> None:
  """--distributed and --heartbeat, for `cached_tx.train.processes.join`."""
  text = (
    "how processes find each other: auto (TPU pods, SLURM, Open MPI, or the variables"
    " COORDINATOR_ADDRESS, NUM_PROCESSES and PROCESS_ID), off, or HOST:PORT,NUM,ID"
  )
  flags.DEFINE_string("distributed", "auto", text, flag_values=values)
  text = "seconds after which a process that says nothing counts as dead"
  flags.DEFINE_integer("heartbeat", 100, text, 1, flag_values=values)


def show(text: str, found: dict[str, Any], path: str | None) -> None:
  """Prints a text, and writes what it was made of to a file, if one is named."""
  print(text)
  if path is not None:
    Path(path).write_text(json.dumps(found, indent=2) + "\n")


def execute(name: str, command: Command, arguments: list[str]) -> int:
  """Runs a command; what the user can mend is one message, not a traceback.

  Args:
    name: of the command.
    command: to run.
    arguments: what follows the name.

  Returns:
    The exit status.
  """
  logging.set_verbosity(logging.ERROR)
  values = flags.FlagValues()
  text = "show where an error arose"
  flags.DEFINE_bool("debug_errors", False, text, flag_values=values)
  argv = [f"cached-tx {name}", *arguments]
  try:
    command.define(values, argv)
    if {"-h", "--help"} & set(arguments):
      print(help_text(name, command, values))
      return 0
    _parse(values, argv)
    return command.run(values) or 0
  except (ValueError, OSError, FloatingPointError, flags.Error) as error:
    if values["debug_errors"].value:
      _leave_others(error)
      raise
    print(f"cached-tx {name}: {error}", file=sys.stderr)
    _leave_others()
    return 1
  except Exception as error:
    _leave_others(error)
    raise


def _leave_others(error: Exception | None = None) -> None:
  """Ends a process among several, which a usual exit would keep waiting for them."""
  processes = sys.modules.get("cached_tx.train.processes")
  if processes is not None and processes.joined():
    if error is not None:
      traceback.print_exception(error)
    processes.leave_at_once(1)


def _parse(values: flags.FlagValues, argv: list[str]) -> None:
  """Raises ValueError in words that fit a command line."""
  try:
    rest = values([_spelled(word, values) for word in argv])
    if "config" in values and values.config is not None:
      dir(values.config.steps)  # a file that cannot be read raises only now
  except flags.UnrecognizedFlagError as error:
    raise ValueError(f"{error}; --help lists the flags") from None
  except flags.IllegalFlagValueError as error:
    raise ValueError(_illegal(str(error))) from None
  except (KeyError, AttributeError) as error:  # of a config's keys
    key = re.search(r"\w+", str(error.args[0]))
    found = re.search(r'Did you mean "(\w+)"', str(error))
    hint = f"; did you mean {found[1]}?" if found else ""
    raise ValueError(f"--config has no key {key[0] if key else error}{hint}") from None
  except OSError as error:
    last = str(error).strip().splitlines()[-1].strip()
    raise ValueError(f"--config cannot be read: {last}") from None
  if len(rest) > 1:
    raise ValueError(f"what is {rest[1]!r}? --help lists the flags")


def _illegal(message: str) -> str:
  """The flag, its value and the rule, of a message that absl has for them."""
  first, *_, last = message.strip().splitlines() * 2  # a traceback may lie between
  for pattern, rule in _RULES.items():
    found = re.fullmatch(rf"flag --([\w.]+)=(.*?): {pattern}", first)
    if found:
      name, value, *more = found.groups()
      return f"--{name} is {value!r}; {rule.format(*more).replace('|', ', ')}"
  found = re.fullmatch(
    r"flag --config=(.*): Error whilst parsing config file:.*", first
  )
  if found:
    return f"--config {found[1]}: {last.removeprefix('ValueError: ')}"
  return first if first == last else f"{first} {last}"


def _spelled(word: str, values: flags.FlagValues) -> str:
  """--save-state is --save_state: a flag's name may have hyphens."""
  name, equals, value = word.partition("=")
  known = "--" + name[2:].replace("-", "_")
  return known + equals + value if name[:2] == "--" and known[2:] in values else word


def help_text(name: str, command: Command, values: flags.FlagValues) -> str:
  """The flags of a command."""
  about = command.help
  lines = [f"usage: cached-tx {name} [flags]", "", about[0].upper() + about[1:], ""]
  for name in values:
    flag = values[name]
    usual = "" if flag.default in (None, "", [], False) else f" ({flag.default})"
    lines.append(f"  --{'[no]' if flag.boolean else ''}{name}")
    about = " ".join(f"{flag.help}{usual}".split())
    lines += textwrap.wrap(about, 80, initial_indent=_SPACE, subsequent_indent=_SPACE)
  return "\n".join(lines)
