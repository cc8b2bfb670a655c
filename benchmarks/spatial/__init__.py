"""A spatial study: does a LLaVA with fewer visual tokens answer as well, and about what?"""
