"""`llava-projectors export`: a LLaVA checkpoint becomes a folder that current transformers and vLLM load."""
