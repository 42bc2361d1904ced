"""What all tests share."""

import signal

# A run started in the background inherits these as ignored, and so would the programs under test.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
