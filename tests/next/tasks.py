"""For `pictures.yaml` and `videos.yaml`: what lmms-eval hands to a model."""

from PIL import Image


def pictures(doc):
    """The pictures of a question, opened."""
    return [Image.open(path).convert("RGB") for path in doc["files"]]


def videos(doc):
    """The path of a question's video."""
    return doc["files"]
