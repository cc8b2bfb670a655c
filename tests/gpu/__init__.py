"""What is checked on a GPU only or above all, and the script that runs all of it: `tests/gpu/run.py`."""
