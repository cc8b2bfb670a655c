"""What is checked on a GPU only or above all, and the command that runs all of it: `python -m tests.gpu`."""
