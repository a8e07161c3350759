"""``python -m turnover``."""

from turnover.cli import main

main()
