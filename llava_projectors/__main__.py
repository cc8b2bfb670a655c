"""`python -m llava_projectors`: the command line, where its script is not on the PATH."""

import sys

from llava_projectors.commands.cli import main

sys.exit(main())
