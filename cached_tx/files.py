"""Files that are there whole or not at all."""

import os
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
  """Replaces a file: a reader, or a crash, sees the old content or the new one.

  Args:
    path: of the file; its folder exists.
    content: text is written in UTF-8.
  """
  data = content.encode() if isinstance(content, str) else content
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    with open(temporary, "wb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)  # a full disk leaves nothing behind
