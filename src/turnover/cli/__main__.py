"""``python -m turnover.cli``."""

from turnover.cli import main

main()
