"""What each projector costs and what the whole model gains: `llava-projectors bench` and `llava-projectors plot`."""
