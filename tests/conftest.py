from __future__ import annotations

import signal

# A shell starts what it puts into the background with Ctrl-C ignored, and so it would be for every program started here.
signal.signal(signal.SIGINT, signal.default_int_handler)
