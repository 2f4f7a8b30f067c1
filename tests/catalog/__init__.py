"""What every op must compute, and how exactly: one file per op, each with its `ENTRY`.

The CPU, interpreter and GPU tests, the cross-compiler and both benchmarks all read this list, so an op whose file is
added here is tested, compiled and measured without writing any of that again.
"""

import importlib
import pkgutil

from catalog.entry import DTYPES, Entry

_modules = (importlib.import_module(f"catalog.{module.name}") for module in pkgutil.iter_modules(__path__))
CATALOG: dict[str, Entry] = {module.ENTRY.name: module.ENTRY for module in _modules if hasattr(module, "ENTRY")}
# (op, case, dtype) of every small case
SMALL_CASES = [
    (name, case, DTYPES[dtype])
    for name, entry in CATALOG.items()
    for case in entry.small_cases
    for dtype in entry.dtypes
]
