"""What tests hold documents to: names and figures, in their order, and never the words between."""

import re


def says(text, *parts):
    """Whether one line of the text has all parts, one after the other; a figure counts with all of its digits."""
    whole = (rf"(?<![\w.]){re.escape(str(part))}(?!\w|\.\d)" for part in parts)
    return re.search(".*?".join(whole), text) is not None
