"""A command in several processes (`--ranks N`, or `torchrun -m minillm`): rank 0 speaks, and an error is told once."""

import argparse
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from tempfile import TemporaryDirectory

from minillm.errors import MinillmError, RankError, RequestError, first_line

SHARED = ("generate", "chat", "bench")  # the commands that share a model; of the others there is one process
_PRECEDENCE = 0.5  # seconds in which rank 0 may say what is wrong with all of them


def complain(error: MinillmError | str) -> int:
    """Print an error as one line; the exit status."""
    text = " ".join(str(error).split())
    print("minillm:", text if len(text) <= 800 else f"{text[:400]} ... {text[-400:]}", file=sys.stderr)
    return 1


def several() -> bool:
    """Whether this is one of the processes that torchrun started."""
    return {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def speaks() -> bool:
    return not several() or os.environ["RANK"] == "0"


def to_start(options: argparse.Namespace) -> bool:
    """Whether the command asks for processes that are not there yet."""
    return not several() and options.command.__name__ in SHARED and (options.ranks or 1) > 1


def be_silent() -> None:
    """Of several processes all but rank 0 say nothing, but for an error (`tell`)."""
    if not speaks():
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def take_part(options: argparse.Namespace) -> bool:
    """Among several processes: whether this one has anything to do."""
    if not several():
        return True
    asked, count = getattr(options, "ranks", None), int(os.environ["WORLD_SIZE"])
    shared = options.command.__name__ in SHARED
    if shared and asked not in (None, count):
        raise RequestError(f"--ranks {asked}, but torchrun started {count} processes: leave out --ranks")
    # Not as an exception: it would wait for a collective that nobody answers any more.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return shared or speaks()


def tell(error: BaseException) -> int:
    """Print why this rank cannot go on, unless another has said why before; the exit status.

    A rank that only misses another says nothing then, and leaves the exit status to that one.
    """
    said = str(error)
    if not isinstance(error, MinillmError):
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__}: {first_line(error)} ({os.path.basename(place.filename)}, line {place.lineno})"
    if not speaks():
        time.sleep(_PRECEDENCE)
        said = said if isinstance(error, RankError) else f"rank {os.environ['RANK']}: {said}"
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # torchrun ends a rank as soon as another has failed
    try:
        if not claim():
            return 0 if isinstance(error, RankError) else 1
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)  # for torchrun's report
        sys.stderr = sys.__stderr__
        return complain(said)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


def claim() -> bool:
    """Whether this rank is the first to say how the command ends."""
    from datetime import timedelta

    from torch.distributed import TCPStore

    where = os.environ.get("MASTER_ADDR", "localhost"), int(os.environ.get("MASTER_PORT", 0))
    try:
        store = TCPStore(*where, is_master=False, timeout=timedelta(seconds=2), wait_for_workers=False)
        return store.add(f"minillm/told/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except RuntimeError:  # whoever kept the list is gone
        return True


def launch(count: int, arguments: Sequence[str]) -> int:
    """The command in `count` processes of this machine, as torchrun starts them; the exit status."""
    import logging

    import torch
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # of torchrun's report one line is left, which is ours
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // count)))
    with TemporaryDirectory(prefix="minillm-", ignore_cleanup_errors=True) as folder:
        where = dict(rdzv_backend="c10d", rdzv_endpoint="localhost:0", local_addr="localhost")
        logs = DefaultLogsSpecs(log_dir=folder)
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=count, run_id="minillm", max_restarts=0, logs_specs=logs, **where
        )
        try:
            elastic_launch(config, sys.executable)("-m", "minillm", *arguments)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if any(os.path.exists(one.error_file) for one in error.failures.values()):
                return 1  # that rank has told
            how = f"was ended by {failure.signal_name()}" if failure.exitcode < 0 else f"ended with {failure.exitcode}"
            return complain(f"rank {rank} of {count} {how}; the others were ended")
        except SignalException as error:
            return 128 + error.sigval
    return 0
