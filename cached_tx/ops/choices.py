"""Which kernels, projections and counts of rows fit each other."""

from cached_tx.ops.features import FEATURES
from cached_tx.ops.projections import PROJECTIONS


def check_rows(
  kernel: str, projection: str, features: int, width: int, usual: int, prefix: str = ""
) -> None:
  """Checks the options of a layer or a memory that makes features of random rows.

  Args:
    kernel: one of `FEATURES`.
    projection: one of `PROJECTIONS`, or none.
    features: M, the rows.
    width: K, of a head.
    usual: what `features` is unless it is given.
    prefix: of the options' names in messages.

  Raises:
    ValueError: naming the option, where one does not fit.
  """
  if features < 1:
    raise ValueError(f"{prefix}features is {features}; it counts rows: 1 or more")
  if kernel not in FEATURES:
    raise ValueError(f"{prefix}kernel is {kernel!r}; one of {', '.join(FEATURES)}")
  if projection not in (*PROJECTIONS, "none"):
    known = ", ".join(PROJECTIONS)
    raise ValueError(f"{prefix}projection is {projection!r}; one of {known} or none")
  if projection == "none" and FEATURES[kernel].projected:
    raise ValueError(
      f"{prefix}projection is 'none', but {prefix}kernel {kernel!r} is made of random "
      f"rows: choose one, or {prefix}kernel relu, elu1 or squares"
    )
  if projection == "none" and features != usual:
    raise ValueError(
      f"{prefix}features is {features}, which counts rows of a projection, but "
      f"{prefix}projection is 'none': leave it at {usual}"
    )
  if projection == "hadamard" and width & (width - 1):
    raise ValueError(
      f"{prefix}projection is 'hadamard' and a head is {width} wide: Hadamard matrices "
      "are made for powers of two; choose another width of heads, or another "
      f"{prefix}projection"
    )
