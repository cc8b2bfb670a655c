"""What loads a folder of `llava-projectors export`: classes for current transformers, a plugin for vLLM."""
