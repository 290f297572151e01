"""``python -m gpsearch`` is ``gpsearch``."""

from gpsearch.cli import main

if __name__ == "__main__":
    main()
