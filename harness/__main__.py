"""`python -m harness VERB ...`."""

import sys

if __name__ == "__main__":  # a spawned child imports this module again and must not start a second harness
    try:
        from harness.cli import main
    except KeyboardInterrupt:  # before there is anything to stop
        sys.exit(130)
    sys.exit(main())
