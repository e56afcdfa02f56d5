"""``python -m svdlib run|sweep|collect|lab|refresh|readme``; each lists its options with ``--help``."""

import os
import signal
import sys


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt(number)


def _open_streams() -> None:
    """Give closed streams a place to write to, which kernels inherit; escape what they can't show."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            nothing = os.open(os.devnull, os.O_RDWR)
            os.dup2(nothing, number)
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    _open_streams()
    try:
        from svdlib.study.running.runner import main
    except ModuleNotFoundError as error:
        sys.exit(f"svdlib: {error}; the notebooks need: pip install 'svdlib[study]'")
    except ValueError as error:  # Dask reads its configuration when it is imported
        print(f"svdlib: {error}", file=sys.stderr)
        sys.exit(2)
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(main())
