"""The built-in projectors, one a file: plain torch modules that know nothing of LLaVA."""
