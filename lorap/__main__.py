"""``python -m lorap`` is the command ``lorap``."""

from lorap.cli import main

main()
