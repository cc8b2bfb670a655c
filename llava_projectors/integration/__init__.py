"""All that knows LLaVA's names: which of them are patched, and what takes their place."""
