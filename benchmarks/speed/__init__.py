"""Time and memory of projectors, tower and whole models, against LLaVA's own and the FLOP bound."""
