"""``python -m svdlib run|sweep|collect|lab|refresh|readme``; each lists its options with ``--help``."""

import signal
import sys


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    try:
        from svdlib.study.running.runner import main
    except ModuleNotFoundError as error:
        sys.exit(f"svdlib: {error}; the notebooks need: pip install 'svdlib[study]'")
    signal.signal(signal.SIGTERM, _stop)
    for stream in (sys.stdout, sys.stderr):  # a terminal that knows no σ shows \u03c3
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.exit(main())
