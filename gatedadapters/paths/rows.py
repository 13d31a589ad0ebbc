"""Rows: new values for the vectors of a few tokens, in the table of token ids or in the map to the vocabulary.

For tokens that were added to a vocabulary, and for known ones that should change. Add new tokens to the model first,
with `model.resize_token_embeddings`.

References:
    peft's `trainable_token_indices` is the same, without gates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor
from torch.nn import functional as F

from gatedadapters.backbone import Layout
from gatedadapters.config import PathOptions
from gatedadapters.errors import PathError
from gatedadapters.paths.base import Path, check_widths, new_parameter, per_token, resized
from gatedadapters.paths.placing import selected_maps
from gatedadapters.paths.site import Site, SkippedSite


def _expanded(value: Any) -> Any:
    """Token ids with every range `"first-last"` written out, sorted; both ends belong to it."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return value
    ids: list[int] = []
    for item in value:
        first, dash, last = str(item).partition("-")
        if not first.strip().isdecimal() or (dash and not last.strip().isdecimal()):
            raise ValueError(f"{item!r} is neither a token id nor a range such as '32000-32015'")
        ids += range(int(first), int(last if dash else first) + 1)
    if len(set(ids)) != len(ids) or not ids:
        raise ValueError("name one token id or more, each once")
    return tuple(sorted(ids))


class RowsOptions(PathOptions):
    """A vector added to the row of each token of `tokens`; each token is a unit of as many parameters as a row has.

    By default at the table of token ids. The map to the vocabulary is another place: `at: {sublayers: [outside]}`, or
    `[embedding, outside]` for both, which then learn values of their own, also in a model that ties the two.

    Attributes:
        tokens: token ids, and ranges of them: `[7, "32000-32015"]`. From Python all tokens from an id on are
            `range(first, vocabulary)`.
    """

    kind: Literal["rows"] = "rows"
    tokens: Annotated[tuple[int, ...], BeforeValidator(_expanded)] = Field(min_length=1)

    @property
    def size(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    def resized(self, size: int) -> Self:
        """The same for the first `size` tokens."""
        return self.select(range(size))

    def select(self, units: Sequence[int]) -> Self:
        """The same for some of the tokens."""
        return self.model_copy(update={"tokens": tuple(self.tokens[unit] for unit in units)})


class Rows(Path):
    """Row t + z_t values_t for every token t; values (tokens, features) are zero at start."""

    kind = "rows"

    tokens: Tensor

    def __init__(self, site: Site, options: RowsOptions, generator: torch.Generator | None = None) -> None:
        super().__init__(site, options, generator)
        self.register_buffer("tokens", torch.tensor(options.tokens), persistent=False)  # the options hold them too
        self.values = new_parameter(options.size, site.width_out if site.reads_ids else site.width_in)

    @classmethod
    def sites(cls, options: PathOptions, layout: Layout) -> Iterator[Site | SkippedSite]:
        """The selected tables of token ids and maps to the vocabulary.

        Raises:
            PathError: a token id lies outside the vocabulary.
        """
        assert isinstance(options, RowsOptions)
        if options.at.sublayers is None:
            where = options.at.model_copy(update={"sublayers": ("embedding",)})
            options = options.model_copy(update={"at": where})
        for block, sublayer, linear in selected_maps(options, layout):
            if linear.role not in {"tokens", "head"} or sublayer.kind not in {"embedding", "outside"} or linear.host:
                continue
            site = Site.at_map(block, sublayer, linear, tap="input", write="output")
            vocabulary = site.width_in if site.reads_ids else site.width_out
            if options.tokens[-1] >= vocabulary:
                raise PathError(
                    "a token id lies outside the vocabulary",
                    expected=f"ids below {vocabulary:,}",
                    got=f"{options.tokens[-1]:,}",
                    where=f"{cls.kind} at {linear.name}",
                    fix="add the tokens first: model.resize_token_embeddings(len(tokenizer))",
                )
            yield site

    @classmethod
    def cost(cls, site: Site, options: PathOptions) -> tuple[int, int, float]:
        """Units are tokens; at the table a unit has to do with one token of the vocabulary, at the head with all."""
        width = site.width_out if site.reads_ids else site.width_in
        return options.size, width, (width / site.width_in if site.reads_ids else 2.0 * width) * site.traffic

    @property
    def units(self) -> int:
        """Number of tokens."""
        return len(self.values)

    def effective(self) -> Tensor:
        """The values as they are added to the rows, (tokens, features)."""
        return self.values

    def forward(self, tapped: Tensor, target: Tensor, gate: Tensor | None) -> Tensor:
        """Add to the vectors that were looked up, or to the logits of the tokens."""
        check_widths(self, tapped, target)
        values, rows = self.effective(), target.reshape(-1, target.shape[-1])
        if gate is not None and gate.dim() == 2:
            gate = per_token(gate, target, str(self.site.tap)).expand(len(rows), self.units)
        elif gate is not None:
            values, gate = values * gate.expand(self.units)[:, None], None
        if not self.site.reads_ids:
            logits = tapped.reshape(-1, tapped.shape[-1]).to(target.dtype) @ values.t().to(target.dtype)
            logits = logits if gate is None else logits * gate
            return rows.index_add(1, self.tokens, logits.to(target.dtype)).view(target.shape)
        ids = tapped.reshape(-1).to(self.tokens)
        slot = torch.searchsorted(self.tokens, ids).clamp(max=self.units - 1)
        found = self.tokens[slot] == ids
        padded = torch.cat([values, values.new_zeros(1, values.shape[1])])  # the last row is for all other tokens
        added = F.embedding(torch.where(found, slot, self.units), padded)
        if gate is not None:
            added = added * gate.gather(1, slot[:, None])
        return (rows + added.to(target.dtype)).view(target.shape)

    @torch.no_grad()
    def learned(self) -> Tensor:
        """Norm of each token's values."""
        size: Tensor = self.effective().norm(dim=1)
        return size

    @torch.no_grad()
    def scale_units(self, scale: Tensor) -> None:
        """Multiply the values."""
        self.values.mul_(scale.to(self.values)[:, None])

    def merge_into(self, weight: Tensor, bias: Tensor | None, gate: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Add the values to the tokens' columns at a table, which is (out, vocabulary) here, else to their rows."""
        values = self.effective().to(weight)
        if gate is not None:
            values = values * gate.to(weight).expand(self.units)[:, None]
        tokens = self.tokens.to(weight.device)
        if self.site.reads_ids:
            return weight.index_add(1, tokens, values.t()), bias
        return weight.index_add(0, tokens, values), bias

    def select_units(self, keep: Tensor) -> None:
        """Keep these tokens."""
        self.values, self.tokens = resized(self.values, self.values[keep]), self.tokens[keep]
