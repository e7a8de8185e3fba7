"""python -m kvbuffer_compile"""

import sys

from kvbuffer_compile.cli import main

sys.exit(main())
