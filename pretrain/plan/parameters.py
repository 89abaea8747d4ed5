"""Count the parameters of a model on the meta device."""

from dataclasses import dataclass

from transformers import PreTrainedModel


@dataclass(frozen=True)
class ParameterCounts:
    """Shared parameters, such as a decoder tied to the embeddings, count once."""

    total: int
    embeddings: int  # modules called `embeddings`
    encoder: int  # the rest of the base model
    head: int  # outside the base model
    largest: int  # of one parameter
    sizes: tuple[int, ...]  # of each parameter


def count_parameters(model: PreTrainedModel) -> ParameterCounts:
    base = model.base_model
    embeddings = {
        id(parameter)
        for name, module in base.named_modules()
        if name.split(".")[-1] == "embeddings"
        for parameter in module.parameters()
    }
    in_base = {id(parameter) for parameter in base.parameters()}
    sizes = {id(parameter): parameter.numel() for parameter in model.parameters()}
    return ParameterCounts(
        total=sum(sizes.values()),
        embeddings=sum(size for key, size in sizes.items() if key in embeddings),
        encoder=sum(size for key, size in sizes.items() if key in in_base and key not in embeddings),
        head=sum(size for key, size in sizes.items() if key not in in_base),
        largest=max(sizes.values()),
        sizes=tuple(sizes.values()),
    )
