"""The checks of one fork that run in its own process: its own type, then ours. Prints one line of JSON.

`python child.py REQUEST`, in an empty folder; whether this plugin is armed is the caller's choice.
"""

import contextlib
import hashlib
import json
import sys
from pathlib import Path

import torch

from llava_projectors.integration import trial


def digest(tensors):
    """One hash of all numbers."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().float().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def same_as_ever(classes, request):
    """Each class with the fork's own default type: its weights and what it answers, or its error."""
    own = trial.own_arguments(request["package"])
    own_type = getattr(own(), "mm_projector_type", None) if own else None
    answers = {}
    for cls in classes:
        try:
            model = trial.build(cls, request["package"], own_type or trial.STOCK_TYPE, request["arguments"])
            torch.manual_seed(1)
            seen = trial.run_once(model)
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            answers[cls.__name__] = f"{digest(model.parameters())} {digest(gradients)} {seen.positions} {seen.loss!r}"
        except Exception as error:
            answers[cls.__name__] = trial.one_line(error) + trial.place_of(error)
    return answers


def with_ours(cls, request):
    """Build, forward, backward, save and load one class with our type."""
    row = {"model": cls.__name__}
    try:
        model = trial.build(cls, request["package"], request["type"], request["arguments"])
        row["seen"] = trial.check(model, trial.run_once(model))
        arguments = trial.training_arguments(request["package"], request["type"], request["arguments"])
        for name in request["config"]:
            setattr(model.config, name, getattr(arguments, name))
        row["save_and_load"] = save_and_load(cls, model)
    except Exception as error:
        trial.traceback.print_exc()
        row["error"] = str(error).strip().split("\n")[0] if isinstance(error, OURS) else trial.one_line(error)
    return row


OURS = (*trial.OUR_ERRORS, trial.CannotWork)


def save_and_load(cls, model):
    """Whether the projector that comes back has the same bits, and gives the same tokens."""
    folder = Path("saved") / cls.__name__
    model.save_pretrained(folder, safe_serialization=False)
    loaded = cls.from_pretrained(folder).float()
    tower = trial.find_tower(loaded)
    if not tower.is_loaded:
        tower.load_model()
    tower.float()
    weights, again = (m.get_model().mm_projector.state_dict() for m in (model, loaded))
    if weights.keys() != again.keys() or not all(torch.equal(weights[k], again[k]) for k in weights):
        return "other weights"
    size = next(trial.forms_of_pictures(tower)).shape[-1]
    picture = torch.randn(1, 3, size, size)
    with torch.no_grad():
        before, after = (
            m.get_model().mm_projector(features[0] if isinstance(features, tuple) else features)
            for m in (model.eval(), loaded.eval())
            for features in [trial.find_tower(m)(picture)]
        )
    return "bit for bit" if torch.equal(before, after) else "other tokens"


def main():
    request = json.loads(sys.argv[1])
    with contextlib.redirect_stdout(sys.stderr):
        answer = run(request)
    print(json.dumps(answer))


def run(request):
    package = request["package"]
    watch = trial.FirstErrors(package)
    sys.meta_path.insert(0, watch)
    try:
        trial.importlib.import_module(package)
    except Exception as error:
        return {"import": trial.one_line(watch.cause_of(error))}
    classes, failures = trial.find_models(package)
    answer = {"failures": {name: trial.one_line(watch.cause_of(error)) for name, error in failures.items()}}
    trial.make_tower(Path(trial.TOWER))
    answer["stock"] = same_as_ever(classes, request)
    answer["ours"] = [with_ours(cls, request) for cls in classes] if request["with_ours"] else []
    return answer


if __name__ == "__main__":
    main()
