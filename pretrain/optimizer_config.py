"""The sections `optimizer` and `optimizer.muon` of the config of a pretraining run."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from experiment.config import Section


class MuonConfig(Section):
    """Muon for the hidden matrices. The other keys of `optimizer` apply to them too, except `betas`, `eps` and, if
    `lr` is set here, `lr`."""

    lr: PositiveFloat | None = None
    """Peak learning rate of the hidden matrices; null: `optimizer.lr`."""

    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Scale of updates, by the shape of the matrix. `match_rms_adamw` (Moonlight): updates are about as large as
    AdamW's, so its learning rate and weight decay carry over. `original` (Jordan): for learning rates such as 0.02."""

    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    """Decay rate of the running average of the gradient."""

    nesterov: bool = True
    """Use Nesterov momentum."""

    precision: Literal["bf16", "fp32"] | None = None
    """Precision of the orthogonalization; null: bf16 in a bf16 run, else fp32."""


class OptimizerConfig(Section):
    """The update rule. See docs/optimizers.md."""

    name: Literal["adamw", "lamb", "stableadamw", "muon"] = "adamw"
    """Optimizer. It cannot change on resume; a fork may use another."""

    lr: PositiveFloat = 5.0e-4
    """Peak learning rate, reached after the warmup."""

    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay; not applied to biases and norms."""

    betas: tuple[Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]] = (0.9, 0.98)
    """Decay rates of the running averages of the gradient and its square."""

    eps: PositiveFloat = 1.0e-6
    """Added to the denominator of the update for numerical stability."""

    grad_clip: NonNegativeFloat = 1.0
    """Maximum norm of the global gradient; 0 disables clipping."""

    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Layer-wise learning-rate decay: ratio of a layer's learning rate to the next layer's. 1 disables it."""

    muon: MuonConfig = MuonConfig()

    @model_validator(mode="after")
    def _no_unused_options(self) -> Self:
        if self.name != "muon" and self.muon != MuonConfig():
            raise ValueError(f"'muon' belongs to the optimizer 'muon', but 'name' is '{self.name}'")
        return self
