"""python -m mgpu_llm.ctl is mgpuctl, for where the script is not on the PATH."""

import sys

from mgpu_llm.ctl.main import main

sys.exit(main())
