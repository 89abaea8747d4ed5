"""The model of a fine-tuning run: that of the seed with the best score on validation, if it has such a split."""

from pathlib import Path

from experiment.checkpoints import complete_checkpoints
from experiment.errors import UserError
from experiment.hub_names import download_hint
from experiment.strict_json import parse_json
from finetune.task_kind import find_kind

RESULTS = "results.json"


def find_model(path: Path) -> tuple[Path, str]:
    """The model folder that `path` refers to, and a line that says which it is.

    path: a model folder, the folder of a seed, or a run. Raises UserError if it is none of these.
    """
    if (path / "config.json").is_file():
        return path, str(path)
    if (path / "model" / "config.json").is_file():
        return path / "model", str(path / "model")
    if (path / RESULTS).is_file():
        return _best_seed(path)
    if checkpoints := complete_checkpoints(path / "checkpoints"):
        raise UserError(
            f"{path} is a pretraining run: expected a model folder, such as {checkpoints[-1] / 'hf'}, or a finished "
            "run of `deepcloze finetune`"
        )
    problem = "holds neither config.json nor results.json" if path.is_dir() else "is not a folder"
    hint = "" if path.exists() else download_hint(path)
    raise UserError(f"{path} {problem}: expected a model folder, such as RUN/seed-1/model, or a finished run{hint}")


def _best_seed(run: Path) -> tuple[Path, str]:
    """The first of the best seeds whose model was kept."""
    path = run / RESULTS
    try:
        results = parse_json(path.read_text(encoding="utf-8"))
        metric, seeds, validation = results["metric"], results["seeds"], results["splits"].get("validation")
        values = dict(zip(seeds, validation[metric]["values"], strict=True)) if validation else {}
        direction = find_kind(results["kind"]).metrics[metric]
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError):
        raise UserError(f"{path} is damaged: expected the results of a fine-tuning run") from None
    kept = [seed for seed in seeds if (run / f"seed-{seed}" / "model" / "config.json").is_file()]
    if not kept:
        raise UserError(f"{run} has kept no model of its seeds; expected RUN/seed-N/model")
    if not values:
        folder = run / f"seed-{kept[0]}" / "model"
        return folder, f"{folder} (the first of {len(seeds)} seeds: there is no validation split to compare them by)"
    best = max(kept, key=lambda seed: direction * values[seed])
    folder = run / f"seed-{best}" / "model"
    return folder, f"{folder} (best of {len(values)} seeds: {metric} {values[best]:.4f} on validation)"
