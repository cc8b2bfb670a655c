"""`python -m llava_projectors`: the command line, where its script is not on the PATH."""

import sys

from llava_projectors.cli import main

sys.exit(main())
