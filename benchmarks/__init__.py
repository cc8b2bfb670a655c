"""What measures; not in the wheel. Without this file, a package of this name among a machine's would be found first."""
