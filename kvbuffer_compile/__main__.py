"""python -m kvbuffer_compile"""

import sys

from kvbuffer_compile.commands.cli import main

sys.exit(main())
