"""LLaVA's whole road on tiny models: made offline, trained by LLaVA's own script, loaded, asked."""
