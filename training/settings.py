"""The keys of the configuration that the training loop reads."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from data.settings import DataSettings
from modeling.settings import ModelSettings
from utils import STRICT, Count, Natural, NonNegative, RunName, Settings, Share


class FunctionSettings(Settings):
    """Settings with the hyper-parameters of a function beside them, which its signature checks."""

    model_config = STRICT | ConfigDict(extra="allow")

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The keys that belong to the function, to the quantities that it asks for and, of a loss, to its classes."""
        return dict(self.model_extra or {})


class LossSettings(FunctionSettings):
    """`loss` of the configuration: which classes, and the hyper-parameters."""

    name: str
    trainer: str | None
    dataloader: str
    lr_at_7b: NonNegative = 5e-7


class TermSettings(FunctionSettings):
    """`term.<name>` of the configuration: something that is added to the loss, and its hyper-parameters."""

    function: str
    weight: NonNegative


class WandbSettings(Settings):
    """`wandb` of the configuration."""

    project: str
    entity: str | None


class TrainingSettings(DataSettings):
    """How long is trained, with what, and what is kept of it."""

    exp_name: RunName
    resume: Literal["auto", "never"]
    n_epochs: Count | None
    n_examples: Count | None
    show_tokens: Natural
    optimizer: str
    optimizer_options: dict[str, Any]
    lr: NonNegative | None
    lr_schedule: Literal["constant", "cosine", "linear", "trapezoid"]
    warmup_ratio: Share
    warmup_steps: Natural | None
    do_first_eval: bool
    eval_every: Count | None
    n_eval_examples: Count | None
    log_every: Count
    save_every: Count | None
    keep_checkpoints: Natural
    export: Annotated[list[Literal["policy_pt", "hub"]], Field(min_length=1)]
    export_dtype: Literal["float32", "bfloat16"] | None
    eval_best: str | None
    intermediate_checkpoints: bool
    toy_comparison: Count | None
    log_to: list[Literal["tensorboard", "wandb"]]
    wandb: WandbSettings
    model: ModelSettings
    loss: LossSettings
    term: dict[str, TermSettings]
