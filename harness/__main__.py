"""`python -m harness VERB ...`."""

import sys

if __name__ == "__main__":  # a spawned child imports this module again and must not start a second harness
    from harness.cli import main

    sys.exit(main())
