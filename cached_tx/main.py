"""The command line: `cached-tx COMMAND ...`, also `python -m cached_tx.main`.

Flags only. What a command needs is imported when it runs, so that help is instant.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import app, flags, logging

STOPPED = 143  # 128 + SIGTERM: what launchers take for "start me again"


class Command(NamedTuple):
  """One word of the command line.

  Attributes:
    help: one line.
    define: makes its flags.
    run: does the work, given the parsed flags; returns the exit status.
  """

  help: str
  define: Callable[[], None]
  run: Callable[[Any], int | None]


def _define_config(required: bool = True) -> None:
  from ml_collections import config_flags

  config_flags.DEFINE_config_file(
    "config", None, "configs/FILE.py[:variant]; change keys with --config.a.b=value"
  )
  if required:
    flags.mark_flag_as_required("config")


def _define_workdir() -> None:
  flags.DEFINE_string("workdir", None, "folder of the run")
  flags.mark_flag_as_required("workdir")


def _define_train() -> None:
  _define_config()
  _define_workdir()


def _train(values: Any) -> int:
  from cached_tx.train.loop import train

  result = train(values.config, values.workdir)
  if result.finished:
    return 0
  done, steps = int(result.state.step), values.config.steps
  print(
    f"cached-tx: stopped by a signal after step {done} of {steps}, which is saved; the"
    f" same command continues there (exit status {STOPPED})",
    file=sys.stderr,
  )
  return STOPPED


COMMANDS = {
  "train": Command("train, or continue, the model of a config", _define_train, _train),
}


def _usage() -> str:
  width = max(map(len, COMMANDS))
  lines = [f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items()]
  return "\n".join(
    [
      "usage: cached-tx COMMAND [flags]",
      "",
      "Transformers that remember more than they attend to.",
      "",
      *lines,
      "",
      "cached-tx COMMAND --help lists the flags of a command.",
    ]
  )


def run(argv: Sequence[str] | None = None) -> None:
  """The entry point; exits the process."""
  argv = list(sys.argv if argv is None else argv)
  name = argv[1] if len(argv) > 1 else ""
  if name in ("", "-h", "--help", "help"):
    print(_usage())
    sys.exit(0 if name else 2)
  if name == "--version":
    from cached_tx import __version__

    print(__version__)
    sys.exit(0)
  if name not in COMMANDS:
    print(f"cached-tx: no command {name!r}\n\n{_usage()}", file=sys.stderr)
    sys.exit(2)
  command = COMMANDS[name]
  sys.modules["__main__"].__doc__ = f"cached-tx {name}: {command.help}"
  command.define()
  app.run(lambda _: _guarded(command), [f"cached-tx {name}", *argv[2:]])


def _guarded(command: Command) -> int:
  logging.set_verbosity(logging.WARNING)
  try:
    return command.run(flags.FLAGS) or 0
  except (ValueError, FileNotFoundError, FloatingPointError) as error:
    if flags.FLAGS.debug_errors:
      raise
    print(f"cached-tx: {error}", file=sys.stderr)
    return 1


flags.DEFINE_bool("debug_errors", False, "show where an error arose")

if __name__ == "__main__":
  run()
