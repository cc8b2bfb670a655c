"""The names by which a module of LLaVA, or of a fork, is known to hold something that is patched.

`autoload` looks here in every interpreter, so this uses the standard library only.
"""

from __future__ import annotations

TYPE_CHECKING = False  # `typing` itself would cost an idle interpreter milliseconds
if TYPE_CHECKING:
    from types import ModuleType

# Functions of modules, methods of classes, and how the names of classes end that load checkpoints, or train.
TOWER_BUILDERS = ("build_vision_tower", "build_image_tower")
PROJECTOR_BUILDERS = ("build_vision_projector", "build_image_projector")
MODEL_LOADERS = ("load_pretrained_model",)
SEAM_FUNCTIONS = frozenset([*TOWER_BUILDERS, *PROJECTOR_BUILDERS, *MODEL_LOADERS])
VISION_INITIALIZER = "initialize_vision_modules"
FURTHER_INITIALIZERS = ("initialize_seg_modules", "initialize_depth_modules")
INITIALIZERS = frozenset([VISION_INITIALIZER, *FURTHER_INITIALIZERS])
INPUTS_PREPARER = "prepare_inputs_labels_for_multimodal"
SEAM_METHODS = INITIALIZERS | {INPUTS_PREPARER}
SEAM_CLASS_ENDING = "ForCausalLM"
TRAINER_CLASS_ENDING = "Trainer"
TRAINING_LOOP, CHECKPOINT_WRITER, BEST_CHECKPOINT = "train", "save_model", "_load_best_model"
TRAINER_METHODS = frozenset([TRAINING_LOOP, CHECKPOINT_WRITER, BEST_CHECKPOINT])


def holds_seam(module: ModuleType) -> bool:
    """Whether the module itself defines a function or class that is patched."""
    for name, value in list(vars(module).items()):
        is_seam = name in SEAM_FUNCTIONS or (
            isinstance(value, type)
            and (name.endswith((SEAM_CLASS_ENDING, TRAINER_CLASS_ENDING)) or not SEAM_METHODS.isdisjoint(vars(value)))
        )
        if is_seam and getattr(value, "__module__", None) == module.__name__:
            return True
    return False
