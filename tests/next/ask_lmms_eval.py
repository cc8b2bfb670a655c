"""`python -m lmms_eval` on the tiny parts."""

import family
from lmms_eval.__main__ import cli_evaluate

family.prepare_process()
cli_evaluate()
