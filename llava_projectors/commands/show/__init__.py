"""Pictures and pages of what each visual token was made from."""

from llava_projectors.commands.show.maps import token_maps
from llava_projectors.commands.show.show import show

__all__ = ["show", "token_maps"]
