"""What every kind of student has in common, and which kind a name stands for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from ft_core.artifacts import MANIFEST, Manifest, read_saved
from ft_core.errors import ArgumentError, ArtifactError, first_line
from ft_core.extras import import_extra
from ft_core.files import restore_folder
from ft_core.jobs import Job, JobEvent
from ft_core.sft.models import KIND as LOCAL_KIND

Kind = Literal["hosted", "local", "encoder"]

EXTRA = "ft-judge[local]"

HOSTED_KIND = "hosted-judge"
ENCODER_KIND = "encoder-judge"
KINDS: Mapping[str, Kind] = {
    HOSTED_KIND: "hosted",
    LOCAL_KIND: "local",
    ENCODER_KIND: "encoder",
}
"""What `ft.json` calls a folder, to the kind of student in it."""

_OF_A_SERVICE = ("base_url", "client", "api_key")
_HOSTED_NAME = re.compile(r"(gpt-\d|ft:)")
_GENERATES = ("ForCausalLM", "LMHeadModel")
_UNCLEAR = "ForConditionalGeneration"  # encoder-decoders, and models that also see


class JudgeStudent(Protocol):
    """A student behind a judge's engine: a job that trains it, and the evaluator that it becomes.

    `finetune` to `cancel` and `job_id` are those of `ft_core.jobs.JobEngine`. A student is made by

        Student(recipe, student, output_dir, **settings)   # does no work, reads nothing
        Student.opened(folder, manifest, **settings)       # of a saved folder, without its data
    """

    job_id: str | None

    def finetune(self, wait: bool = True, timeout: float | None = None) -> Job:
        """Train on `recipe.lessons()` or `recipe.examples()` and save to the output folder."""

    def wait(self, timeout: float | None = None) -> Job:
        """Return the job once it has succeeded."""

    def get_current_job(self) -> Job:
        """Return the job as it stands."""

    def events(self) -> list[JobEvent]:
        """Return what the job has reported."""

    def cancel(self) -> Job:
        """Stop the job."""

    def get_evaluator(self, options: Mapping[str, Any], **settings: Any) -> Any:
        """Return a `BaseEvaluator`.

        Args:
            options: `enforce_consensus` for pairs, `score_threshold` for correctness.
            settings: of the model.
        """


def encoder_student() -> Any:
    """Return the class of students that score without writing, `EncoderJudgeStudent`.

    It is a `JudgeStudent` in `ft_judge.encoder`, whose folders have the kind `ENCODER_KIND`, with
    the task at `settings["judge"]["task"]` in `ft.json`. It takes `recipe.examples()`: pairs come
    once, as the order cannot matter to it, and `recipe.reasoning` is False. Its results carry
    `probability`, of pairs that the first answer is better, of correctness that the score is
    right (`ft_judge.judging.Judgement`).
    """
    from ft_judge.encoder import EncoderJudgeStudent

    return EncoderJudgeStudent


def kind_of(student: str, settings: Mapping[str, Any]) -> Kind:
    """Return the kind of student that a name and its settings stand for.

    Hosted is what has a service's settings, or a name such as `gpt-4o-mini` or `ft:...` that is
    no folder here. Of others the model's configuration tells: what writes text is `local`, any
    other encoder is `encoder`.

    Raises:
        ArgumentError: there is no such model, or it is neither.
        MissingExtraError: `ft-judge[local]` is not installed.
    """
    folder = Path(student).expanduser()
    if any(settings.get(name) is not None for name in _OF_A_SERVICE):
        return "hosted"
    if _HOSTED_NAME.match(student) and not folder.is_dir():
        return "hosted"
    if (folder / "adapter_config.json").is_file():
        return "local"
    transformers = import_extra("transformers", EXTRA)
    try:
        config = transformers.AutoConfig.from_pretrained(
            str(folder) if folder.is_dir() else student
        )
    except (OSError, ValueError) as error:
        raise ArgumentError(
            "student",
            f"{student!r} cannot be loaded: {first_line(error)}; of a model that a service trains, "
            "pass kind='hosted'",
        ) from error
    architectures = config.architectures or []
    if any(name.endswith(_GENERATES) for name in architectures):
        return "local"
    unclear = any(name.endswith(_UNCLEAR) for name in architectures)
    if unclear or config.is_encoder_decoder or not architectures:
        raise ArgumentError(
            "kind",
            f"{student}: its configuration names {architectures or 'no architecture'}; say "
            "whether it is 'local' or 'encoder'",
        )
    return "encoder"


def saved(folder: Path | str) -> tuple[Kind, Manifest]:
    """Return what kind of student a folder holds, and its `ft.json`.

    Raises:
        ArtifactError: there is no such folder, or it is damaged or of another kind.
    """
    folder = Path(folder).expanduser()
    restore_folder(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(
            f"{folder}: holds no judge (there is no {MANIFEST}); train first, or check the path"
        )
    manifest = read_saved(path, Manifest)
    if manifest.kind not in KINDS:
        raise ArtifactError(f"{folder}: holds a {manifest.kind}, which is no judge")
    if manifest.format > 1:
        raise ArtifactError(f"{path}: format {manifest.format} is newer than this release reads")
    return KINDS[manifest.kind], manifest


def student_class(kind: Kind) -> Any:
    """Return the class of a kind's students."""
    if kind == "encoder":
        return encoder_student()
    if kind == "hosted":
        from ft_judge.hosted import HostedJudgeStudent

        return HostedJudgeStudent
    from ft_judge.local import LocalJudgeStudent

    return LocalJudgeStudent


def checked_kind(kind: str) -> Kind | Literal["auto"]:
    """Return a kind that exists.

    Raises:
        ArgumentError: it does not.
    """
    known = ("auto", *KINDS.values())
    if kind not in known:
        raise ArgumentError("kind", f"is one of {', '.join(known)}, not {kind!r}")
    return cast("Kind | Literal['auto']", kind)
