"""For `pictures.yaml`: opens the picture that a question names."""

from PIL import Image


def doc_to_visual(doc):
    """The picture of one question, as lmms-eval wants it."""
    return [Image.open(doc["image"]).convert("RGB")]
